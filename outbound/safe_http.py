"""An HTTP client for addresses that users name: checked addresses, no redirect, no proxy, no cookie, bounded time and size.

Not covered: limits on how many calls go out; the callers hold those.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpcore
import httpx

from core.errors import PlatformError
from outbound.addresses import AddressRefused, NetworkPolicy

__all__ = ["MAX_RESPONSE_BYTES", "AddressRefused", "Answer", "NetworkPolicy", "ResponseTooLarge", "check_url", "make_client", "send"]

MAX_RESPONSE_BYTES = 1024 * 1024
CONNECT_SECONDS = 10.0
MAX_ADDRESSES = 16

SocketOptions = Iterable[httpcore.SOCKET_OPTION]


class ResponseTooLarge(PlatformError):
    code = "response_too_large"


@dataclass(frozen=True)
class Answer:
    """A whole response; `body` as it came over the wire, never decompressed."""

    status: int
    headers: httpx.Headers
    body: bytes


def check_url(url: str, policy: NetworkPolicy, param: str = "url") -> None:
    """What can be said of `url` without resolving its name. Raises: AddressRefused naming `param`."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise AddressRefused(f"'{param}' is not a URL.", param=param) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise AddressRefused(f"'{param}' must begin with https:// or http:// and name a host.", param=param)
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise AddressRefused(f"'{param}' has no such port: {parsed.port}.", param=param)
    if parsed.userinfo:
        raise AddressRefused(f"'{param}' must not hold a user name or password; a URL is shown as it is.", param=param)
    if parsed.scheme == "http" and not policy.allow_http and not policy.allowed_private_networks:
        raise AddressRefused(f"'{param}' must begin with https:// on this server.", param=param)
    literal = _literal_address(parsed.host)
    try:
        policy.check([literal] if literal else [], cleartext=parsed.scheme == "http")
    except AddressRefused as error:
        raise AddressRefused(f"'{param}': {error.message}", param=param) from error


def make_client(
    policy: NetworkPolicy, *, timeout_seconds: float, max_connections: int = 16, ssl_context: ssl.SSLContext | None = None
) -> httpx.AsyncClient:
    """A client that goes only where `policy` allows. It belongs to the event loop that first uses it."""
    timeout = httpx.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds))
    return httpx.AsyncClient(
        transport=_GuardedTransport(policy, max_connections, ssl_context or httpx.create_ssl_context(trust_env=False)),
        timeout=timeout,
        trust_env=False,
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        headers={"user-agent": "hone", "accept-encoding": "identity"},
    )


async def send(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    headers: dict[str, str],
    body: bytes,
    deadline_seconds: float,
    max_bytes: int = MAX_RESPONSE_BYTES,
) -> Answer:
    """One request and its whole answer. The deadline covers all of it, so that a slow drip cannot hold the caller.

    Raises: TimeoutError at the deadline; httpx.HTTPError; AddressRefused; ResponseTooLarge.
    """
    try:
        target = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise AddressRefused("The address is not a URL.") from error
    async with asyncio.timeout(deadline_seconds), client.stream(method, target, headers=headers, content=body) as response:
        received = bytearray()
        async for chunk in response.aiter_raw():
            received += chunk
            if len(received) > max_bytes:
                raise ResponseTooLarge(f"The response is longer than {max_bytes} bytes.")
        return Answer(response.status_code, response.headers, bytes(received))


class _GuardedTransport(httpx.AsyncBaseTransport):
    """One pool per scheme, so that the connect step knows whether it is asked for cleartext."""

    def __init__(self, policy: NetworkPolicy, max_connections: int, ssl_context: ssl.SSLContext) -> None:
        self._pools = {
            scheme.encode(): httpcore.AsyncConnectionPool(
                ssl_context=ssl_context,
                max_connections=max_connections,
                max_keepalive_connections=max_connections,
                keepalive_expiry=15.0,
                network_backend=_GuardedBackend(policy, cleartext=scheme == "http"),
            )
            for scheme in ("http", "https")
        }

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        pool = self._pools.get(request.url.raw_scheme)
        if pool is None:
            raise httpx.UnsupportedProtocol("Only http and https are supported.")
        core_request = httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=request.url.raw_scheme, host=request.url.raw_host, port=request.url.port, target=request.url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx_errors():
            response = await pool.handle_async_request(core_request)
        return httpx.Response(response.status, headers=response.headers, stream=_Body(response), extensions=response.extensions)

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx_errors():
            async for chunk in self._response.aiter_stream():
                yield chunk

    async def aclose(self) -> None:
        with _as_httpx_errors():
            await self._response.aclose()


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name once, refuses it unless every answer is allowed, and connects to one of those very addresses."""

    def __init__(self, policy: NetworkPolicy, *, cleartext: bool) -> None:
        self._policy = policy
        self._cleartext = cleartext
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.AsyncNetworkStream:
        ends_at = time.monotonic() + (timeout or CONNECT_SECONDS)
        addresses = await self._resolve(host, port, ends_at)
        self._policy.check(addresses, cleartext=self._cleartext)
        failure: httpcore.NetworkError | httpcore.TimeoutException = httpcore.ConnectError("the name has no address")
        for position, address in enumerate(addresses):
            share = max(0.001, ends_at - time.monotonic()) / (len(addresses) - position)
            try:
                return await self._sockets.connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise AddressRefused("Unix sockets are not reachable.")

    async def sleep(self, seconds: float) -> None:
        await self._sockets.sleep(seconds)

    @staticmethod
    async def _resolve(host: str, port: int, ends_at: float) -> list[str]:
        try:
            async with asyncio.timeout(ends_at - time.monotonic()):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from error
        except (OSError, UnicodeError, OverflowError) as error:
            raise httpcore.ConnectError("the name could not be resolved") from error
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))[:MAX_ADDRESSES]


def _literal_address(host: str) -> str | None:
    """The address that `host` spells, also in the decimal, octal and hex forms that resolvers take; None for a name."""
    try:
        return host if ":" in host else socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


_ERRORS: tuple[tuple[type[Exception], type[httpx.HTTPError]], ...] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
)


@contextmanager
def _as_httpx_errors() -> Iterator[None]:
    """httpcore's exceptions as httpx's own of the same name."""
    try:
        yield
    except tuple(ours for ours, _ in _ERRORS) as error:
        raise next(theirs for ours, theirs in _ERRORS if isinstance(error, ours))(str(error)) from error
