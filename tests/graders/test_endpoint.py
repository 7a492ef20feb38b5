import asyncio
import itertools
import json
import time
from typing import Any

import pytest
import standardwebhooks

from core.errors import InvalidRequest
from graders.calls import RetryPolicy
from graders.endpoint import check_headers
from outbound.safe_http import NetworkPolicy
from outbound.signing import generate_secret
from tests.fake_endpoint import FakeEndpoint, Received, Reply, answer, dripping, hang, score, status
from tests.graders.helpers import FAST, SECRET, endpoint_grader, grade, grade_all, request


def test_the_wire_is_the_published_shape_signed() -> None:
    with FakeEndpoint([score(0.8)]) as endpoint:
        sent = request("Answer: 4", item={"answer": "4", "messages": [{"role": "user", "content": "2+2?"}]}, finish_reason="length")
        result = grade(endpoint_grader(endpoint, headers={"Authorization": "Bearer abc"}), sent)
    (received,) = endpoint.requests
    assert (result.reward, result.error, result.attempts) == (0.8, None, 1)
    assert (received.method, received.path) == ("POST", "/grade")
    message = {"role": "assistant", "content": "Answer: 4", "tool_calls": []}
    assert received.json == {
        "sample": {
            "output_text": "Answer: 4",
            "output_json": None,
            "output_tools": [],
            "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        },
        "item": {"answer": "4", "messages": [{"role": "user", "content": "2+2?"}]},
        "trace_id": "trace_1",
        "metadata": {"job_id": "ftjob-1", "grader_version": "grader_a@1"},
    }
    standardwebhooks.Webhook(SECRET).verify(received.body, received.headers)
    assert received.headers["webhook-id"] == received.headers["idempotency-key"] == "k" * 64
    assert received.headers["authorization"] == "Bearer abc"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["traceparent"].count("-") == 3


def test_retries_keep_the_id_and_sign_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    real, ticks = time.time, itertools.count()
    monkeypatch.setattr("graders.endpoint.time.time", lambda: real() + next(ticks))
    with FakeEndpoint([status(503), status(429), score(1.0)]) as endpoint:
        result = grade(endpoint_grader(endpoint))
    assert (result.reward, result.attempts) == (1.0, 3)
    for received in endpoint.requests:
        standardwebhooks.Webhook(SECRET).verify(received.body, received.headers)
    seen = {
        name: [received.headers[name] for received in endpoint.requests]
        for name in ("webhook-id", "webhook-timestamp", "webhook-signature")
    }
    assert len(set(seen["webhook-id"])) == 1
    assert len(set(seen["webhook-timestamp"])) == len(set(seen["webhook-signature"])) == 3
    assert len({received.body for received in endpoint.requests}) == 1


@pytest.mark.parametrize("left", [60.0, -1.0], ids=["overlap", "over"])
def test_during_a_rotation_the_old_secret_signs_too_and_not_a_moment_longer(left: float) -> None:
    old = generate_secret()
    more = {"previous_signing_secret": old, "previous_expires_at": time.time() + left}
    with FakeEndpoint([score(1.0)]) as endpoint:
        grade(endpoint_grader(endpoint, more_secrets=more))
    (received,) = endpoint.requests
    standardwebhooks.Webhook(SECRET).verify(received.body, received.headers)
    if left > 0:
        standardwebhooks.Webhook(old).verify(received.body, received.headers)
    else:
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(old).verify(received.body, received.headers)


def test_the_old_secret_is_masked_too() -> None:
    old = generate_secret()
    with FakeEndpoint([answer({"score": 1, "explanation": f"{old} {old.removeprefix('whsec_')}"})]) as endpoint:
        result = grade(endpoint_grader(endpoint, more_secrets={"previous_signing_secret": old, "previous_expires_at": 0.0}))
    assert old.removeprefix("whsec_") not in repr(result)


def test_no_attempt_runs_beyond_the_deadline_of_the_grade() -> None:
    """Its own timeout would let it: the last attempt is cut at what is left."""
    with FakeEndpoint([status(503), hang()]) as endpoint:
        started = time.monotonic()
        retry = RetryPolicy(base_seconds=0.01, deadline_seconds=0.6)
        result = grade(endpoint_grader(endpoint, timeout_seconds=30.0, retry=retry))
    assert (result.error, result.attempts) == ("grader_timeout", 2)
    assert 0.5 < time.monotonic() - started < 5.0


RETRIED = [
    (Reply(reset=True), "grader_connection_error"),
    (Reply(b"{}", cut_after=1), "grader_connection_error"),
    (Reply(raw=b"SSH-2.0-OpenSSH\r\n\r\n"), "grader_connection_error"),
    (hang(), "grader_timeout"),
    (dripping(0.05), "grader_timeout"),
    (status(408), "grader_http_error"),
    (status(425), "grader_http_error"),
    (status(429), "grader_http_error"),
    (status(500), "grader_http_error"),
    (status(503), "grader_http_error"),
    (status(599), "grader_http_error"),
]
FINAL = [
    (status(301, location="http://169.254.169.254/"), "grader_http_error"),
    (status(400), "grader_http_error"),
    (status(401), "grader_http_error"),
    (status(404), "grader_http_error"),
    (status(422), "grader_http_error"),
    (Reply(b""), "grader_invalid_json"),
    (Reply(b"<html>"), "grader_invalid_json"),
    (Reply(b'{"score": 1'), "grader_invalid_json"),
    (Reply(b"\xff\xfe\x00"), "grader_invalid_json"),
    (Reply(b"[" * 100_000), "grader_invalid_json"),
    (Reply(b"0.5"), "grader_invalid_score"),
    (Reply(b"{}"), "grader_invalid_score"),
    (Reply(b'[{"score": 1}]'), "grader_invalid_score"),
    (score(float("nan")), "grader_invalid_score"),
    (score(float("inf")), "grader_invalid_score"),
    (score(-float("inf")), "grader_invalid_score"),
    (Reply(b'{"score": 1e999}'), "grader_invalid_score"),
    (Reply(b'{"score": 1' + b"0" * 400 + b"}"), "grader_invalid_score"),
    (score("0.5"), "grader_invalid_score"),
    (score(True), "grader_invalid_score"),
    (score([1]), "grader_invalid_score"),
    (answer({"score": 1, "sub_scores": {"a": "x"}}), "grader_invalid_score"),
    (answer({"score": 1, "sub_scores": {"a": float("nan")}}), "grader_invalid_score"),
    (answer({"score": 1, "sub_scores": [1]}), "grader_invalid_score"),
    (answer({"score": 1, "sub_scores": {str(number): 1 for number in range(65)}}), "grader_invalid_score"),
    (answer({"score": 1, "explanation": {"a": 1}}), "grader_invalid_score"),
    (score(1.01), "grader_score_out_of_range"),
    (score(-0.01), "grader_score_out_of_range"),
    (Reply(b'{"score": 1, "explanation": "' + b"x" * 1024 * 1024 + b'"}'), "grader_response_too_large"),
    (Reply(b"x" * 4096, endless=True), "grader_response_too_large"),
]


@pytest.mark.parametrize(("reply", "code"), RETRIED)
def test_what_may_pass_is_retried_and_then_failed_without_a_number(reply: Reply, code: str) -> None:
    with FakeEndpoint([reply]) as endpoint:
        result = grade(endpoint_grader(endpoint, max_attempts=3, timeout_seconds=0.2 if code == "grader_timeout" else 10.0))
        assert (result.reward, result.error, result.attempts, len(endpoint.requests)) == (None, code, 3, 3)
        assert result.is_outage
        assert not result.abstained


@pytest.mark.parametrize(("reply", "code"), FINAL)
def test_what_would_come_again_is_failed_at_once_without_a_number(reply: Reply, code: str) -> None:
    with FakeEndpoint([reply]) as endpoint:
        result = grade(endpoint_grader(endpoint, reward_range=(0.0, 1.0)))
        assert (result.reward, result.error, result.attempts, len(endpoint.requests)) == (None, code, 1, 1)
        assert not result.abstained
        assert result.error_message is not None
        assert len(result.error_message) < 400


@pytest.mark.parametrize("value", [0, 1, 0.5, -3.5, 1e300, 12345])
def test_score_is_taken_as_it_is(value: float) -> None:
    with FakeEndpoint([score(value)]) as endpoint:
        assert grade(endpoint_grader(endpoint)).reward == value


def test_null_score_abstains() -> None:
    with FakeEndpoint([answer({"score": None, "explanation": "cannot tell"})]) as endpoint:
        result = grade(endpoint_grader(endpoint, reward_range=(0.0, 1.0)))
    assert (result.reward, result.abstained, result.error, result.explanation) == (None, True, None, "cannot tell")


def test_sub_scores_and_explanation_are_kept_and_bounded() -> None:
    body = {"score": 0.5, "sub_scores": {"format": 1, "right": 0.25, "unknown": None}, "explanation": "x" * 10_000, "extra": {"ignored": 1}}
    with FakeEndpoint([answer(body)]) as endpoint:
        result = grade(endpoint_grader(endpoint))
    assert result.sub_scores == {"format": 1.0, "right": 0.25}
    assert result.explanation is not None
    assert len(result.explanation) == 4000


def test_retry_after_is_obeyed_but_bounded() -> None:
    with FakeEndpoint([status(429, retry_after="3600"), score(1.0)]) as endpoint:
        retry = RetryPolicy(base_seconds=0.0, max_retry_after_seconds=0.3)
        assert grade(endpoint_grader(endpoint, retry=retry)).reward == 1.0
    first, second = endpoint.requests
    assert 0.3 <= second.at - first.at < 10.0


def test_retry_after_beyond_the_deadline_ends_the_grade_at_once() -> None:
    with FakeEndpoint([status(503, retry_after="30")]) as endpoint:
        started = time.monotonic()
        result = grade(endpoint_grader(endpoint, retry=RetryPolicy(deadline_seconds=20.0)))
        assert (result.error, result.attempts) == ("grader_http_error", 1)
        assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("reply", [hang(), dripping(0.02), status(503)], ids=["hang", "drip", "503"])
def test_a_grade_ends_by_its_deadline_whatever_comes(reply: Reply) -> None:
    with FakeEndpoint([reply]) as endpoint:
        started = time.monotonic()
        retry = RetryPolicy(base_seconds=0.05, deadline_seconds=0.5)
        result = grade(endpoint_grader(endpoint, timeout_seconds=0.2, max_attempts=10, retry=retry))
        assert time.monotonic() - started < 5.0
        assert result.error is not None
        assert result.attempts >= 2


def test_nobody_listening_is_a_connection_error() -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        url = endpoint.url
    result = grade(endpoint_grader(url, max_attempts=2))
    assert (result.error, result.attempts) == ("grader_connection_error", 2)


def test_refused_address_is_its_own_kind_and_nothing_is_sent() -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        result = grade(endpoint_grader(endpoint, network=NetworkPolicy(allow_http=True)))
        assert (result.reward, result.error, result.attempts) == (None, "grader_address_refused", 1)
        assert endpoint.requests == []


def test_no_more_calls_are_open_than_the_concurrency_allows() -> None:
    with FakeEndpoint([score(1.0, delay=0.05)]) as endpoint:
        results = asyncio.run(grade_all(endpoint_grader(endpoint, max_concurrency=3), *[request() for _ in range(12)]))
    assert [result.reward for result in results] == [1.0] * 12
    assert endpoint.most_open == 3


def test_calls_begin_no_faster_than_the_rate() -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        started = time.monotonic()
        asyncio.run(grade_all(endpoint_grader(endpoint, rate_limit=40.0), *[request() for _ in range(9)]))
    times = sorted(received.at for received in endpoint.requests)
    assert all(at - started >= number / 40 - 0.005 for number, at in enumerate(times))


def test_latency_is_of_the_grade_not_of_the_queue() -> None:
    with FakeEndpoint([score(1.0, delay=0.1)]) as endpoint:
        started = time.monotonic()
        results = asyncio.run(grade_all(endpoint_grader(endpoint, max_concurrency=1), *[request() for _ in range(4)]))
        total = time.monotonic() - started
    assert all(result.latency_seconds >= 0.1 for result in results)
    assert sum(result.latency_seconds for result in results) <= total


def test_cancel_lets_go_of_the_connection_at_once() -> None:
    async def cancel_one(endpoint: FakeEndpoint) -> float:
        grader = endpoint_grader(endpoint)
        task = asyncio.create_task(grader.grade(request()))
        await asyncio.to_thread(endpoint.wait_for_requests, 1)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(endpoint.wait_until_idle, 2.0)
        await grader.close()
        return time.monotonic() - started

    with FakeEndpoint([hang()]) as endpoint:
        assert asyncio.run(cancel_one(endpoint)) < 2.0


def test_a_cancelled_grade_gives_its_place_back() -> None:
    async def one_after_another(endpoint: FakeEndpoint) -> float | None:
        grader = endpoint_grader(endpoint, max_concurrency=1)
        task = asyncio.create_task(grader.grade(request()))
        await asyncio.to_thread(endpoint.wait_for_requests, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return (await grade_all(grader, request()))[0].reward

    with FakeEndpoint([hang(), score(0.5)]) as endpoint:
        assert asyncio.run(one_after_another(endpoint)) == 0.5


KEY = "sk-very/secret+value=="


def echo(received: Received) -> Reply:
    """An endpoint that answers with what it was sent, as debugging servers do."""
    text = json.dumps(received.headers)
    bodies = {
        "error": Reply(text.encode(), status=400),
        "garbage": Reply(text.encode()[:-1]),
        "explanation": answer({"score": 1, "explanation": f"you sent {received.headers['authorization']}"}),
        "sub_scores": answer({"score": 1, "sub_scores": {KEY: 1.0}}),
        "bad_sub_score": answer({"score": 1, "sub_scores": {KEY: "x"}}),
    }
    return bodies[received.json["item"]["answer"]]


@pytest.mark.parametrize("how", ["error", "garbage", "explanation", "sub_scores", "bad_sub_score"])
def test_secret_that_the_endpoint_echoes_is_masked(how: str) -> None:
    with FakeEndpoint(echo) as endpoint:
        grader = endpoint_grader(endpoint, headers={"Authorization": f"Bearer {KEY}"})
        result = grade(grader, request(item={"answer": how}))
    assert KEY not in repr(result)
    assert json.dumps(KEY)[1:-1] not in repr(result)
    assert "**********" in repr(result)


def test_a_short_header_value_is_not_masked() -> None:
    with FakeEndpoint([answer({"score": 1, "explanation": "version 1 of 1"})]) as endpoint:
        assert grade(endpoint_grader(endpoint, headers={"x-version": "1"})).explanation == "version 1 of 1"


@pytest.mark.parametrize(
    "headers",
    [
        {"bad name": "x"},
        {"x\r\nevil": "x"},
        {"x-a": "v\r\nevil: 1"},
        {"x-a": "caf\u00e9"},
        {"x-a": " padded "},
        {"Host": "other"},
        {"Content-Length": "3"},
        {"WEBHOOK-ID": "mine"},
        {"x-a": "s" * 8193},
    ],
)
def test_header_that_cannot_be_sent_is_refused_without_its_value(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_headers(headers)
    assert "evil: 1" not in caught.value.message
    assert "sss" not in caught.value.message


def test_headers_that_can_be_sent_are_accepted() -> None:
    check_headers({"Authorization": "Bearer abc.def", "x-empty": "", "X-Api-Key": "~!@#"})


@pytest.mark.parametrize("item", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}], ids=["nan", "inf", "object"])
def test_row_that_is_not_json_is_its_own_error_and_is_not_sent(item: dict[str, Any]) -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        result = grade(endpoint_grader(endpoint), request(item=item))
        assert (result.reward, result.error) == (None, "grader_request_invalid")
        assert endpoint.requests == []


def test_hostile_text_arrives_unchanged() -> None:
    text = "\u0000 \ud800 \U0001f600 </script> {{item.x}}\n" + "x" * 100_000
    with FakeEndpoint([score(1.0)]) as endpoint:
        assert grade(endpoint_grader(endpoint), request(text)).reward == 1.0
    assert endpoint.requests[0].json["sample"]["output_text"] == text


def test_without_a_secret_the_call_is_unsigned_but_has_its_id() -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        grade(endpoint_grader(endpoint, signing_secret=None, retry=FAST), request(idempotency_key=""))
    headers = endpoint.requests[0].headers
    assert "webhook-signature" not in headers
    assert headers["webhook-id"].startswith("run_")
