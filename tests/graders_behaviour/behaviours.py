"""What a grader can do to a job: each row a way to misbehave, and what the job must make of it."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

from core.run_directory import End
from tests.fake_endpoint import Reply, answer, dripping, hang, score, silent_after_headers, status

TIMEOUT_SECONDS = 1.0
"""Of rows that wait for it: long beside what a good answer takes on a busy machine."""

MAX_ATTEMPTS = 2
TWICE = 2 * MAX_ATTEMPTS
"""Calls for a completion that is lost to the grader's surroundings: it is asked again once the grader has answered a probe."""

HASTY = {"timeout_seconds": TIMEOUT_SECONDS, "max_attempts": 1}
BATCH = {"format": "batch", "batch_size": 4}
RANGE = {"reward_range": [0.0, 1.0]}
TIMEOUT, CONNECTION, HTTP = "grader_timeout", "grader_connection_error", "grader_http_error"
INVALID_JSON, INVALID_SCORE, OUT_OF_RANGE = "grader_invalid_json", "grader_invalid_score", "grader_score_out_of_range"
TOO_LARGE, REFUSED = "grader_response_too_large", "grader_address_refused"
ONE, FIRST, ALL, UNTIL_CALL = "one completion", "every first call", "every call", "the first calls"


@dataclass(frozen=True)
class Behaviour:
    name: str
    reply: Callable[[], Reply] | None = None
    """The misbehaviour; None where no request gets as far as an answer."""

    to: str = ONE
    """Which calls get it. `every first call`: the first one about each completion. The others get a score."""

    error: str | None = None
    """What the completions that are lost are lost to; None: nothing is lost."""

    calls: int | None = None
    """About the one completion that the row is about."""

    options: dict[str, Any] = field(default_factory=dict)
    end: End = End.SUCCEEDED
    min_seconds: float = 0.0
    place: str = "http"
    """Where the grader is: `http`, or a key of `places` in the test."""

    is_abstained: bool = False
    is_graded_half: bool = False
    """The misbehaviour holds a score of 0.5, which counts."""

    mix_up: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None
    """In the format `batch`: what becomes of the right results."""

    until_call: int = 0
    """With `the first calls`: so many, about whatever completion, and probes."""

    def __str__(self) -> str:
        return self.name


def lost(name: str, reply: Callable[[], Reply], error: str, calls: int, **options: Any) -> Behaviour:
    """One completion always gets `reply` and is lost to it; its siblings are graded."""
    return Behaviour(name, reply, error=error, calls=calls, options=options)


def passing(name: str, reply: Callable[[], Reply], min_seconds: float = 0.0, **options: Any) -> Behaviour:
    """Every completion gets `reply` once, then its score: nothing is lost."""
    return Behaviour(name, reply, to=FIRST, min_seconds=min_seconds, options=options)


def away(name: str, error: str, reply: Callable[[], Reply] | None = None, place: str = "http", **options: Any) -> Behaviour:
    """Nothing is graded: the job pauses."""
    return Behaviour(name, reply, to=ALL, error=error, end=End.PAUSED, place=place, options=options)


def mixed_up(name: str, error: str, mix_up: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Behaviour:
    """Nothing says any more which score is whose: the job pauses."""
    return Behaviour(name, to=ALL, error=error, end=End.PAUSED, options=BATCH, mix_up=mix_up)


def in_date_form(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def raw(text: str) -> Callable[[], Reply]:
    return lambda: Reply(raw=text.replace("\n", "\r\n").encode())


GOOD = '{"score": 0.5}'
BOMB = gzip.compress(b"0" * 20_000_000)
DEEP = b"[" * 100_000
TWO_ANSWERS = f"HTTP/1.1 200 OK\ncontent-length: {len(GOOD)}\n\n{GOOD}HTTP/1.1 200 OK\ncontent-length: 3\n\n123"

BEHAVIOURS = [
    lost("hangs before the headers", hang, TIMEOUT, 2, **HASTY),
    lost("hangs after the headers", silent_after_headers, TIMEOUT, 2, **HASTY),
    lost("drips a byte now and then", lambda: dripping(0.4), TIMEOUT, 2, **HASTY),
    passing("hangs once", hang, min_seconds=TIMEOUT_SECONDS, timeout_seconds=TIMEOUT_SECONDS),
    lost("resets the connection", lambda: Reply(reset=True), CONNECTION, TWICE),
    passing("resets the connection once", lambda: Reply(reset=True)),
    lost("cuts the body", lambda: score(0.5, cut_after=5), CONNECTION, TWICE),
    lost("speaks no HTTP", raw("SSH-2.0-OpenSSH_9.6\n"), CONNECTION, TWICE),
    lost("chunks that are none", raw("HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\nzz\n{}\n0\n\n"), CONNECTION, TWICE),
    lost("promises less than it sends", raw(f"HTTP/1.1 200 OK\ncontent-length: 6\n\n{GOOD}"), INVALID_JSON, 1),
    lost("promises more than it sends", raw(f"HTTP/1.1 200 OK\ncontent-length: 99\n\n{GOOD}"), CONNECTION, TWICE),
    Behaviour("sends two answers at once", raw(TWO_ANSWERS), calls=1, is_graded_half=True),
    *[lost(f"{code} for ever", lambda code=code: status(code), HTTP, TWICE) for code in (408, 425, 500, 502, 503, 504)],
    lost("429 for ever, without Retry-After", lambda: status(429), HTTP, TWICE),
    *[passing(f"{code} once", lambda code=code: status(code)) for code in (408, 425, 500, 502, 503, 504)],
    passing("429 once, without Retry-After", lambda: status(429)),
    passing("429 once, Retry-After in seconds", lambda: status(429, retry_after="1"), min_seconds=1.0),
    passing("429 once, Retry-After as a date", lambda: status(429, retry_after=in_date_form(2.0)), min_seconds=1.0),
    *[lost(f"{code}", lambda code=code: status(code), HTTP, 1) for code in (400, 401, 403, 404, 413, 422)],
    lost("redirects to a private address", lambda: status(302, location="http://169.254.169.254/latest/"), HTTP, 1),
    lost("a body of 2 MiB", lambda: Reply(b" " * 2**21 + GOOD.encode()), TOO_LARGE, 1),
    lost("a body without end", lambda: Reply(b" " * 65536, endless=True), TOO_LARGE, 1),
    lost("a gzip bomb", lambda: Reply(BOMB, headers={"content-encoding": "gzip"}), INVALID_JSON, 1),
    lost("204 and no body", lambda: Reply(status=204), INVALID_JSON, 1),
    lost("an empty body", Reply, INVALID_JSON, 1),
    lost("HTML", lambda: Reply(b"<html>It works!</html>", headers={"content-type": "text/html"}), INVALID_JSON, 1),
    lost("JSON with a comma too many", lambda: Reply(b'{"score": 0.5,}'), INVALID_JSON, 1),
    lost("JSON of 100,000 levels", lambda: Reply(DEEP), INVALID_JSON, 1),
    lost("a list", lambda: answer([0.5]), INVALID_SCORE, 1),
    lost("no score", lambda: answer({"reward": 0.5}), INVALID_SCORE, 1),
    lost("NaN", lambda: score(float("nan")), INVALID_SCORE, 1),
    lost("Infinity", lambda: score(float("inf")), INVALID_SCORE, 1),
    lost("a number beyond float", lambda: Reply(b'{"score": 1e999}'), INVALID_SCORE, 1),
    lost("a string", lambda: score("0.5"), INVALID_SCORE, 1),
    lost("a boolean", lambda: score(True), INVALID_SCORE, 1),
    lost("a score above the range", lambda: score(1.5), OUT_OF_RANGE, 1, **RANGE),
    lost("a negative score", lambda: score(-0.5), OUT_OF_RANGE, 1, **RANGE),
    Behaviour("null: it abstains", lambda: score(None), calls=1, is_abstained=True),
    Behaviour("another content type", lambda: Reply(GOOD.encode(), headers={"content-type": "text/plain"}), calls=1, is_graded_half=True),
    Behaviour("503 for a while", lambda: status(503), to=UNTIL_CALL, until_call=18, calls=MAX_ATTEMPTS + 1, min_seconds=0.8),
    mixed_up("a batch with one result missing", "grader_wrong_count", lambda results: results[:-1]),
    mixed_up("a batch with one result too many", "grader_wrong_count", lambda results: [*results, results[0]]),
    mixed_up("a batch with an id that was not sent", "grader_unknown_id", lambda results: [*results[:-1], {"id": "x", "score": 0.5}]),
    mixed_up("a batch with a result without an id", "grader_missing_id", lambda results: [*results[:-1], {"score": 0.5}]),
    mixed_up("a batch with one id only", "grader_duplicate_id", lambda results: [results[0]] * max(2, len(results))),
    Behaviour("a batch in another order", to=ALL, options=BATCH, mix_up=lambda results: results[::-1]),
    away("503 for good", HTTP, lambda: status(503)),
    away("404 for good", HTTP, lambda: status(404)),
    away("NaN for good", INVALID_SCORE, lambda: score(float("nan"))),
    away("nobody listens", CONNECTION, place="closed port"),
    away("no such name", CONNECTION, place="unknown name"),
    away("a certificate of its own making", CONNECTION, place="self-signed"),
    away("a certificate for another name", CONNECTION, place="wrong host"),
    away("a private address", REFUSED, place="private"),
]
assert len({behaviour.name for behaviour in BEHAVIOURS}) == len(BEHAVIOURS)
assert json.loads(GOOD) == {"score": 0.5}
