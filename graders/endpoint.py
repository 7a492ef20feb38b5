"""A grader behind a URL: signed, paced, bounded in time and size, retried where another attempt may help.

Source: the `single` wire format is the published Azure `endpoint` shape; signatures are Standard Webhooks.
"""

import asyncio
import hashlib
import json
import random
import re
import secrets
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from core.errors import InvalidRequest
from core.grader_specs import PinnedEndpointGrader
from core.redaction import Redactor, secret_values
from graders.grade import Grade, GradeFailure, GradeRequest, failed, shorten
from graders.limits import Pacer
from graders.reply import parse_reply
from outbound.safe_http import AddressRefused, Answer, NetworkPolicy, ResponseTooLarge, check_url, make_client, send
from outbound.signing import ID_HEADER, TIMESTAMP_HEADER, sign

RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
MAX_HEADER_CHARACTERS = 8192
RESERVED_HEADERS = frozenset(
    {"accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "host", "idempotency-key"}
    | {"te", "traceparent", "trailer", "transfer-encoding", "upgrade", "webhook-id", "webhook-signature", "webhook-timestamp"}
)


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
class _Verdict:
    """How one attempt ended."""

    grade: Grade
    is_final: bool = True
    retry_after: float = 0.0


class EndpointGrader:
    """Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        spec: PinnedEndpointGrader,
        *,
        headers: Mapping[str, str],
        signing_secret: str | None,
        network: NetworkPolicy,
        retry: RetryPolicy | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        check_url(spec.url, network)
        check_headers(headers)
        self._spec = spec
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._signing_secret = signing_secret
        self._retry = retry or RetryPolicy()
        self._redactor = Redactor(secret_values({"endpoint": {"headers": headers, "signing_secret": signing_secret}}))
        self._places = asyncio.Semaphore(spec.max_concurrency)
        self._pacer = Pacer(spec.rate_limit)
        self._client = make_client(
            network, timeout_seconds=spec.timeout_seconds, max_connections=spec.max_concurrency, ssl_context=ssl_context
        )

    async def grade(self, request: GradeRequest) -> Grade:
        message_id = request.idempotency_key or f"run_{secrets.token_hex(16)}"
        try:
            body = json.dumps(self._payload(request, message_id), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return failed(GradeFailure.REQUEST_INVALID, f"The row cannot be sent as JSON: {type(error).__name__}.", attempts=0)
        async with self._places:
            return await self._grade_with_retries(message_id, body)

    async def close(self) -> None:
        await self._client.aclose()

    def _payload(self, request: GradeRequest, message_id: str) -> dict[str, Any]:
        return {
            "sample": request.sample,
            "item": request.item,
            "trace_id": request.trace_id or f"trace_{message_id[:32]}",
            "metadata": {**request.metadata, "grader_version": self._spec.grader_version},
        }

    async def _grade_with_retries(self, message_id: str, body: bytes) -> Grade:
        await self._pacer.wait()
        started = time.monotonic()
        deadline = started + (self._retry.deadline_seconds or 2 * self._spec.timeout_seconds + 60)
        attempt = 1
        while True:
            verdict = await self._attempt(message_id, body, min(self._spec.timeout_seconds, deadline - time.monotonic()))
            grade = replace(verdict.grade, attempts=attempt, latency_seconds=time.monotonic() - started)
            wait = self._retry.wait_seconds(attempt, verdict.retry_after)
            if verdict.is_final or attempt >= self._spec.max_attempts or time.monotonic() + wait >= deadline:
                return grade
            await asyncio.sleep(wait)
            await self._pacer.wait()
            if time.monotonic() >= deadline:
                return grade
            attempt += 1

    async def _attempt(self, message_id: str, body: bytes, timeout_seconds: float) -> _Verdict:
        try:
            answer = await send(
                self._client,
                "POST",
                self._spec.url,
                headers=self._request_headers(message_id, body),
                body=body,
                deadline_seconds=timeout_seconds,
            )
        except (TimeoutError, httpx.TimeoutException):
            return _Verdict(failed(GradeFailure.TIMEOUT, f"No answer within {timeout_seconds:.3g} seconds."), is_final=False)
        except AddressRefused as error:
            return _Verdict(failed(GradeFailure.ADDRESS_REFUSED, error.message))
        except ResponseTooLarge as error:
            return _Verdict(failed(GradeFailure.RESPONSE_TOO_LARGE, error.message))
        except httpx.HTTPError as error:
            # Before the connection stands no header has been written; later texts may quote one.
            detail = f" ({error})" if isinstance(error, httpx.ConnectError) else ""
            return _Verdict(failed(GradeFailure.CONNECTION, f"The call failed: {type(error).__name__}{detail}."), is_final=False)
        return self._judge(answer)

    def _judge(self, answer: Answer) -> _Verdict:
        if 200 <= answer.status < 300:
            return _Verdict(parse_reply(answer.body, self._spec.reward_range, self._redactor))
        excerpt = shorten(self._redactor.clean(answer.body.decode(errors="replace")), 200)
        note = "; redirects are not followed" if 300 <= answer.status < 400 else ""
        grade = failed(GradeFailure.HTTP, f"HTTP {answer.status}{note}: {excerpt!r}")
        return _Verdict(grade, answer.status not in RETRIED_STATUSES, _retry_after(answer.headers.get("retry-after")))

    def _request_headers(self, message_id: str, body: bytes) -> dict[str, str]:
        """Signed anew for each attempt: the id stays, timestamp and signature are fresh."""
        timestamp = int(time.time())
        if self._signing_secret is None:
            signature = {ID_HEADER: message_id, TIMESTAMP_HEADER: str(timestamp)}
        else:
            signature = sign(self._signing_secret, message_id, timestamp, body)
        trace = hashlib.sha256(message_id.encode()).hexdigest()[:32]
        return {
            **self._headers,
            **signature,
            "content-type": "application/json",
            "accept": "application/json",
            "idempotency-key": message_id,
            "traceparent": f"00-{trace}-{secrets.token_hex(8)}-01",
        }


def check_headers(headers: Mapping[str, str], param: str = "headers") -> None:
    """Raises: InvalidRequest naming the header, never its value, when it cannot be sent or is one that the platform sets."""
    for name, value in headers.items():
        where = f"{param}.{name}"
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", name):
            raise InvalidRequest(f"'{where}' is not a header name.", param=param)
        if name.lower() in RESERVED_HEADERS:
            raise InvalidRequest(f"'{where}' is set by the platform.", param=where)
        if len(value) > MAX_HEADER_CHARACTERS or not re.fullmatch(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?|", value):
            raise InvalidRequest(f"The value of '{where}' must be at most {MAX_HEADER_CHARACTERS} printable ASCII characters.", param=where)


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
