import asyncio
import datetime
import re
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from outbound.safe_http import AddressRefused, Answer, NetworkPolicy, ResponseTooLarge, check_url, make_client, send
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Reply, dripping, hang, score, status

LOCAL = NetworkPolicy(LOOPBACK)
CLOSED = NetworkPolicy(allow_http=True)


async def fetch(url: str, policy: NetworkPolicy = LOCAL, *, deadline: float = 5.0, context: ssl.SSLContext | None = None) -> Answer:
    async with make_client(policy, timeout_seconds=deadline, ssl_context=context) as client:
        return await send(client, "POST", url, headers={"x-test": "1"}, body=b"{}", deadline_seconds=deadline)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "169.254.169.254",
        "10.0.0.1",
        "100.64.0.1",
        "0.0.0.0",
        "[fd00::1]",
        "[64:ff9b::7f00:1]",
        "192.0.2.1",
        "224.0.0.1",
        "[fe80::1]",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_private_address_in_any_spelling_is_never_connected_to(scheme: str, host: str) -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        with pytest.raises(AddressRefused):
            asyncio.run(fetch(f"{scheme}://{host}:{endpoint.port}/", CLOSED))
        assert endpoint.requests == []


def test_name_is_resolved_once_and_the_checked_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: a second look-up would give another address; there is none."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]])
    asked: list[str] = []

    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with FakeEndpoint([score(1.0)]) as endpoint:
        answer = asyncio.run(fetch(f"http://grader.example:{endpoint.port}/"))
        assert (answer.status, asked) == (200, ["grader.example"])
        assert endpoint.requests[0].headers["host"] == f"grader.example:{endpoint.port}"


def test_a_name_with_one_private_address_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.1", "10.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with FakeEndpoint([score(1.0)]) as endpoint:
        with pytest.raises(AddressRefused):
            asyncio.run(fetch(f"http://grader.example:{endpoint.port}/"))
        assert endpoint.requests == []


def test_a_dead_address_is_passed_over_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with FakeEndpoint([score(1.0)]) as endpoint:
        assert asyncio.run(fetch(f"http://grader.example:{endpoint.port}/")).status == 200


def test_a_name_that_does_not_resolve_is_a_connection_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with pytest.raises(httpx.ConnectError, match="could not be resolved"):
        asyncio.run(fetch("http://grader.example/"))


def test_a_resolver_that_hangs_ends_at_the_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        await asyncio.sleep(3600)
        return []

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with pytest.raises((httpx.ConnectTimeout, TimeoutError)):
        asyncio.run(fetch("http://grader.example/", deadline=0.2))


def test_redirect_is_not_followed() -> None:
    with FakeEndpoint([score(1.0)]) as inner, FakeEndpoint([status(302, location=inner.url)]) as outer:
        assert asyncio.run(fetch(outer.url)).status == 302
        assert inner.requests == []


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"])
def test_proxy_from_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    with FakeEndpoint([status(502)]) as proxy, FakeEndpoint([score(1.0)]) as endpoint:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        assert asyncio.run(fetch(endpoint.url)).status == 200
        assert proxy.requests == []


@pytest.mark.parametrize(
    "reply",
    [hang(), dripping(0.05), Reply(raw=b"HTTP/1.1 102 Wait\r\n\r\n" * 3 + b"HTTP/1.1 20")],
    ids=["silence", "slow drip", "half a status line"],
)
def test_no_answer_holds_the_caller_beyond_the_deadline(reply: Reply) -> None:
    with FakeEndpoint([reply]) as endpoint:
        started = time.monotonic()
        with pytest.raises((TimeoutError, httpx.TimeoutException, httpx.RemoteProtocolError)):
            asyncio.run(fetch(endpoint.url, deadline=0.3))
        assert time.monotonic() - started < 1.5
        endpoint.wait_until_idle(2.0)


@pytest.mark.parametrize("reply", [Reply(b"x" * (1024 * 1024 + 1)), Reply(b"x" * 65536, endless=True)], ids=["long", "endless"])
def test_response_is_bounded(reply: Reply) -> None:
    with FakeEndpoint([reply]) as endpoint:
        with pytest.raises(ResponseTooLarge):
            asyncio.run(fetch(endpoint.url))
        endpoint.wait_until_idle(2.0)


def test_a_response_of_exactly_the_bound_is_taken() -> None:
    with FakeEndpoint([Reply(b"x" * (1024 * 1024))]) as endpoint:
        assert len(asyncio.run(fetch(endpoint.url)).body) == 1024 * 1024


def test_endless_headers_are_bounded() -> None:
    with FakeEndpoint([Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"x-pad: " + b"y" * 2_000_000)]) as endpoint, pytest.raises(httpx.HTTPError):
        asyncio.run(fetch(endpoint.url))


def test_cookies_are_not_kept() -> None:
    async def twice(url: str) -> None:
        async with make_client(LOCAL, timeout_seconds=5.0) as client:
            for _ in range(2):
                await send(client, "POST", url, headers={}, body=b"{}", deadline_seconds=5.0)

    with FakeEndpoint([Reply(b"{}", headers={"set-cookie": "a=b"})]) as endpoint:
        asyncio.run(twice(endpoint.url))
        assert ["cookie" in request.headers for request in endpoint.requests] == [False, False]


@pytest.mark.parametrize(
    ("url", "policy"),
    [
        ("ftp://example.com/", CLOSED),
        ("https://", CLOSED),
        ("https://user:secret@example.com/", CLOSED),
        ("http://example.com/", NetworkPolicy()),
        ("https://127.0.0.1/", NetworkPolicy()),
        ("https://0x7f.1/", NetworkPolicy()),
        ("https://[::1]/", NetworkPolicy()),
        ("https://example.com:99999/", CLOSED),
    ],
)
def test_url_that_could_never_be_called_is_refused_without_a_look_up(url: str, policy: NetworkPolicy) -> None:
    with pytest.raises(AddressRefused) as caught:
        check_url(url, policy, param="grader.url")
    assert caught.value.param == "grader.url"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(("url", "policy"), [("https://example.com/x", NetworkPolicy()), ("http://127.0.0.1:9/", LOCAL)])
def test_url_that_may_be_called_is_accepted(url: str, policy: NetworkPolicy) -> None:
    check_url(url, policy)


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's context, client's context that trusts it) for one host name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = built.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(secret + pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "both.pem")
    return server, ssl.create_default_context(cadata=pem.decode())


def test_tls_checks_the_name_although_the_address_is_pinned(tmp_path: Path) -> None:
    server, trusting = certificate(tmp_path, "localhost")
    with FakeEndpoint([score(1.0)], ssl_context=server) as endpoint:
        assert asyncio.run(fetch(endpoint.url, context=trusting)).status == 200
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            asyncio.run(fetch(endpoint.url.replace("localhost", "127.0.0.1"), context=trusting))
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            asyncio.run(fetch(endpoint.url))


def test_rooms_that_call_out_have_no_client_but_the_guarded_one() -> None:
    """Every call has the guard and its timeouts because there is no other way out."""
    root = Path(__file__).parents[2]
    others = re.compile(
        r"\bhttpx\.(?:Async)?Client\(|\bhttpx\.(?:get|post|put|request|stream)\(|\burllib\.request\b|\brequests\.|\baiohttp\b"
    )
    files = [path for room in ("graders", "outbound", "trainer", "housekeeping") for path in sorted((root / room).glob("*.py"))]
    found = [str(path.relative_to(root)) for path in files if others.search(path.read_text())]
    assert found == ["outbound/safe_http.py"]
