"""Calls to a service behind a URL: paced, bounded in time and size, retried where another attempt may help.

What is asked and how an answer is read is the caller's: an endpoint or a judge.
"""

import asyncio
import hashlib
import random
import re
import secrets
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from core.grader_specs import CallOptions
from core.redaction import Redactor
from graders.grade import Grade, GradeFailure, failed, shorten
from graders.limits import Pacer
from outbound.safe_http import AddressRefused, Answer, NetworkPolicy, ResponseTooLarge, check_url, make_client, send

RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})


@dataclass(frozen=True)
class RetryPolicy:
    """Waits between the attempts at one grade: full jitter, doubling."""

    base_seconds: float = 0.5
    cap_seconds: float = 30.0
    max_retry_after_seconds: float = 60.0
    deadline_seconds: float | None = None
    """For all attempts and waits of one grade. None: twice the timeout and a minute, which stays below `stall_seconds`."""

    def wait_seconds(self, attempt: int, retry_after: float) -> float:
        """Before the attempt after `attempt`: never shorter than what the server asked for, as far as that is bounded."""
        jitter = random.uniform(0.0, min(self.cap_seconds, self.base_seconds * 2.0 ** (attempt - 1)))
        return jitter + min(retry_after, self.max_retry_after_seconds)


@dataclass(frozen=True)
class Request:
    """One call; the same in every attempt, but for what `make_headers` does afresh."""

    body: bytes
    make_headers: Callable[[], dict[str, str]]
    read: Callable[[bytes], Grade]
    """The grade in the body of an answer with a status of 2xx."""


@dataclass(frozen=True)
class Verdict:
    """How one attempt ended."""

    grade: Grade
    is_final: bool = True
    retry_after: float = 0.0
    status: int | None = None
    """Of the answer; None where there was none."""


class Service:
    """Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        url: str,
        options: CallOptions,
        redactor: Redactor,
        network: NetworkPolicy,
        *,
        retry: RetryPolicy | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        check_url(url, network)
        self._url = url
        self._options = options
        self._redactor = redactor
        self._retry = retry or RetryPolicy()
        self._places = asyncio.Semaphore(options.max_concurrency)
        self._pacer = Pacer(options.rate_limit)
        self._client = make_client(
            network, timeout_seconds=options.timeout_seconds, max_connections=options.max_concurrency, ssl_context=ssl_context
        )

    @property
    def deadline_seconds(self) -> float:
        return self._retry.deadline_seconds or 2 * self._options.timeout_seconds + 60

    async def ask(self, request: Request, deadline_seconds: float | None = None) -> Verdict:
        """The last attempt's verdict, its grade with the number of attempts and the time from the first of them."""
        async with self._places:
            await self._pacer.wait()
            return await self._ask_with_retries(request, self.deadline_seconds if deadline_seconds is None else deadline_seconds)

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask_with_retries(self, request: Request, deadline_seconds: float) -> Verdict:
        started = time.monotonic()
        deadline = started + deadline_seconds
        attempt = 1
        while True:
            verdict = await self._attempt(request, min(self._options.timeout_seconds, deadline - time.monotonic()))
            grade = replace(verdict.grade, attempts=attempt, latency_seconds=time.monotonic() - started)
            verdict = replace(verdict, grade=grade)
            wait = self._retry.wait_seconds(attempt, verdict.retry_after)
            if verdict.is_final or attempt >= self._options.max_attempts or time.monotonic() + wait >= deadline:
                return verdict
            await asyncio.sleep(wait)
            await self._pacer.wait()
            if time.monotonic() >= deadline:
                return verdict
            attempt += 1

    async def _attempt(self, request: Request, timeout_seconds: float) -> Verdict:
        try:
            answer = await send(
                self._client,
                "POST",
                self._url,
                headers=request.make_headers(),
                body=request.body,
                deadline_seconds=timeout_seconds,
            )
        except (TimeoutError, httpx.TimeoutException):
            return Verdict(failed(GradeFailure.TIMEOUT, f"No answer within {timeout_seconds:.3g} seconds."), is_final=False)
        except AddressRefused as error:
            return Verdict(failed(GradeFailure.ADDRESS_REFUSED, error.message))
        except ResponseTooLarge as error:
            return Verdict(failed(GradeFailure.RESPONSE_TOO_LARGE, error.message))
        except httpx.HTTPError as error:
            # Before the connection stands no header has been written; later texts may quote one.
            detail = f" ({error})" if isinstance(error, httpx.ConnectError) else ""
            return Verdict(failed(GradeFailure.CONNECTION, f"The call failed: {type(error).__name__}{detail}."), is_final=False)
        return self._judge(answer, request)

    def _judge(self, answer: Answer, request: Request) -> Verdict:
        if 200 <= answer.status < 300:
            return Verdict(request.read(answer.body), status=answer.status)
        excerpt = shorten(self._redactor.clean(answer.body.decode(errors="replace")), 200)
        note = "; redirects are not followed" if 300 <= answer.status < 400 else ""
        is_final = answer.status not in RETRIED_STATUSES
        grade = replace(failed(GradeFailure.HTTP, f"HTTP {answer.status}{note}: {excerpt!r}"), was_refused=is_final)
        return Verdict(grade, is_final, _retry_after(answer.headers.get("retry-after")), answer.status)


def common_headers(message_id: str) -> dict[str, str]:
    """Of every call: what names the grade stays the same in all attempts, the span is new in each."""
    trace = hashlib.sha256(message_id.encode()).hexdigest()[:32]
    return {
        "content-type": "application/json",
        "accept": "application/json",
        "idempotency-key": message_id,
        "traceparent": f"00-{trace}-{secrets.token_hex(8)}-01",
    }


def message_id(idempotency_key: str) -> str:
    """Names one grade at the service; made up where nothing will be repeated."""
    return idempotency_key or f"run_{secrets.token_hex(16)}"


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, in either of its forms; 0 without a readable one."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
