"""Calls to a service behind a URL: paced, bounded in time and size, retried where another attempt may help.

What is asked and how an answer is read is the caller's: an endpoint or a judge.
"""

import asyncio
import hashlib
import random
import re
import secrets
import ssl
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from core.grader_specs import CallOptions
from core.redaction import Redactor
from graders.grade import Grade, GradeFailure, failed, shorten
from graders.limits import LimitsUnavailable, MakeLimiter, local_limiter
from outbound.safe_http import AddressRefused, Answer, NetworkPolicy, ResponseTooLarge, check_url, make_client, send

RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
HEDGE_WINDOW = 200
HEDGE_SAMPLES = 20


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
    read: Callable[[bytes], list[Grade]]
    """The grades in the body of an answer with a status of 2xx."""

    num_grades: int = 1


@dataclass(frozen=True)
class Verdict:
    """How one attempt ended."""

    grades: list[Grade]
    """Of each completion that was asked about; the failure of the whole call is the failure of each."""

    is_final: bool = True
    retry_after: float = 0.0
    status: int | None = None
    """Of the answer; None where there was none."""

    @property
    def grade(self) -> Grade:
        """Of the only completion."""
        (grade,) = self.grades
        return grade

    @property
    def has_failed(self) -> bool:
        """Whether the call brought no grade at all."""
        return all(grade.error is not None for grade in self.grades)


class Service:
    """Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        url: str,
        options: CallOptions,
        redactor: Redactor,
        network: NetworkPolicy,
        *,
        hedge: bool = False,
        retry: RetryPolicy | None = None,
        make_limiter: MakeLimiter = local_limiter,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        check_url(url, network)
        self._url = url
        self._options = options
        self._redactor = redactor
        self._retry = retry or RetryPolicy()
        self._hedge = Hedge() if hedge else None
        self._limiter = make_limiter(url, options)
        self._client = make_client(
            network, timeout_seconds=options.timeout_seconds, max_connections=options.max_concurrency, ssl_context=ssl_context
        )

    @property
    def deadline_seconds(self) -> float:
        return self._retry.deadline_seconds or 2 * self._options.timeout_seconds + 60

    def place(self) -> AbstractAsyncContextManager[None]:
        """Waits for a place among the calls that may be open. Raises: LimitsUnavailable."""
        return self._limiter.place()

    async def ask(self, request: Request, deadline_seconds: float | None = None) -> Verdict:
        """The last attempt's verdict, its grades with the number of attempts and the time from the first of them."""
        try:
            async with self.place():
                return await self.ask_in_place(request, deadline_seconds)
        except LimitsUnavailable as error:
            return Verdict([failed(GradeFailure.LIMITS_UNAVAILABLE, error.message, attempts=0)] * request.num_grades)

    async def ask_in_place(self, request: Request, deadline_seconds: float | None = None) -> Verdict:
        """As `ask`, for a caller that holds a place."""
        started = time.monotonic()
        deadline = started + (self.deadline_seconds if deadline_seconds is None else deadline_seconds)
        attempts = 0
        while True:
            may_hedge = attempts + 2 <= self._options.max_attempts
            verdict, num_sent = await self._attempt(request, min(self._options.timeout_seconds, deadline - time.monotonic()), may_hedge)
            attempts += num_sent
            seconds = time.monotonic() - started
            verdict = replace(verdict, grades=[replace(grade, attempts=attempts, latency_seconds=seconds) for grade in verdict.grades])
            wait = self._retry.wait_seconds(attempts, verdict.retry_after)
            if verdict.is_final or attempts >= self._options.max_attempts or time.monotonic() + wait >= deadline:
                return verdict
            await asyncio.sleep(wait)
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._limiter.pace()
            except (TimeoutError, LimitsUnavailable):
                return verdict

    async def close(self) -> None:
        await self._limiter.close()
        await self._client.aclose()

    async def _attempt(self, request: Request, timeout_seconds: float, may_hedge: bool) -> tuple[Verdict, int]:
        """The verdict and how many calls were sent for it."""

        async def send_one() -> Verdict:
            return await self._send(request, timeout_seconds)

        if self._hedge is None or not may_hedge:
            return await send_one(), 1
        return await self._hedge.ask(send_one, self.place)

    async def _send(self, request: Request, timeout_seconds: float) -> Verdict:
        def lost(failure: GradeFailure, message: str, *, is_final: bool = True) -> Verdict:
            return Verdict([failed(failure, message)] * request.num_grades, is_final)

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
            return lost(GradeFailure.TIMEOUT, f"No answer within {timeout_seconds:.3g} seconds.", is_final=False)
        except AddressRefused as error:
            return lost(GradeFailure.ADDRESS_REFUSED, error.message)
        except ResponseTooLarge as error:
            return lost(GradeFailure.RESPONSE_TOO_LARGE, error.message)
        except httpx.HTTPError as error:
            # Before the connection stands no header has been written; later texts may quote one.
            detail = f" ({error})" if isinstance(error, httpx.ConnectError) else ""
            return lost(GradeFailure.CONNECTION, f"The call failed: {type(error).__name__}{detail}.", is_final=False)
        return self._judge(answer, request)

    def _judge(self, answer: Answer, request: Request) -> Verdict:
        if 200 <= answer.status < 300:
            return Verdict(request.read(answer.body), status=answer.status)
        excerpt = shorten(self._redactor.clean(answer.body.decode(errors="replace")), 200)
        note = "; redirects are not followed" if 300 <= answer.status < 400 else ""
        is_final = answer.status not in RETRIED_STATUSES
        grade = replace(failed(GradeFailure.HTTP, f"HTTP {answer.status}{note}: {excerpt!r}"), was_refused=is_final)
        return Verdict([grade] * request.num_grades, is_final, _retry_after(answer.headers.get("retry-after")), answer.status)


class Hedge:
    """Sends a call that is slower than nearly all before it a second time. The first valid answer counts, and nothing else does."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=HEDGE_WINDOW)
        """Of the newest calls with a valid answer."""

    async def ask(
        self, send_one: Callable[[], Awaitable[Verdict]], place: Callable[[], AbstractAsyncContextManager[None]]
    ) -> tuple[Verdict, int]:
        """The verdict and how many calls were sent for it; the caller holds a place, the second call takes one of its own."""
        num_sent = 1

        async def timed() -> Verdict:
            started = time.monotonic()
            verdict = await send_one()
            if not verdict.has_failed:
                self._seconds.append(time.monotonic() - started)
            return verdict

        async def second() -> Verdict:
            nonlocal num_sent
            async with place():
                num_sent += 1
                return await timed()

        calls = [asyncio.create_task(timed())]
        try:
            await asyncio.wait(calls, timeout=self._delay())
            if not calls[0].done():
                calls.append(asyncio.create_task(second()))
            return await _first_valid(calls, lambda: num_sent), num_sent
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def _delay(self) -> float | None:
        """The 95th percentile of the calls before; None, which is for ever, until there are enough of them."""
        if len(self._seconds) < HEDGE_SAMPLES:
            return None
        return statistics.quantiles(self._seconds, n=20)[-1]


async def _first_valid(calls: list["asyncio.Task[Verdict]"], num_sent: Callable[[], int]) -> Verdict:
    """The first verdict that brings a grade; where no call that was sent brings one, the last of theirs."""
    open_calls = set(calls)
    verdicts: list[Verdict] = []
    while len(verdicts) < num_sent():
        done, open_calls = await asyncio.wait(open_calls, return_when=asyncio.FIRST_COMPLETED)
        verdicts += [call.result() for call in done if not isinstance(call.exception(), LimitsUnavailable)]
        if valid := [verdict for verdict in verdicts if not verdict.has_failed]:
            return valid[0]
    return verdicts[-1]


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
