"""A grader behind a URL, called and answered in one of the wire formats, every call signed.

Source: the `single` wire format is the published Azure `endpoint` shape, `openrlhf` that of OpenRLHF's remote reward models;
signatures are Standard Webhooks.
"""

import json
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.errors import InvalidRequest
from core.grader_specs import PinnedEndpointGrader
from core.redaction import Redactor, secret_values
from graders.calls import Request, RetryPolicy, Service, common_headers, message_id
from graders.formats import FORMATS, Asked, call_name
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.grouping import Grouper
from graders.limits import LimitsUnavailable, MakeLimiter, local_limiter
from outbound.safe_http import NetworkPolicy
from outbound.signing import ID_HEADER, TIMESTAMP_HEADER, sign

MAX_HEADER_CHARACTERS = 8192
RESERVED_HEADERS = frozenset(
    {"accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "host", "idempotency-key"}
    | {"te", "traceparent", "trailer", "transfer-encoding", "upgrade", "webhook-id", "webhook-signature", "webhook-timestamp"}
)


class EndpointGrader:
    """Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        spec: PinnedEndpointGrader,
        secret: Mapping[str, Any],
        *,
        network: NetworkPolicy,
        retry: RetryPolicy | None = None,
        make_limiter: MakeLimiter = local_limiter,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`secret`: {"headers", "signing_secret", "previous_signing_secret", "previous_expires_at"}, each of which may be missing."""
        headers = secret.get("headers") or {}
        check_headers(headers)
        self._spec = spec
        self._secret = secret
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._redactor = Redactor(secret_values({"endpoint": secret}))
        self._service = Service(
            spec.url, spec, self._redactor, network, hedge=spec.hedge, retry=retry, make_limiter=make_limiter, ssl_context=ssl_context
        )
        self._format = FORMATS[spec.format]
        size = spec.batch_size or self._format.batch_size
        self._grouper = Grouper(size, self._service.place, self._ask_in_place) if size > 1 else None

    async def grade(self, request: GradeRequest) -> Grade:
        metadata = {**request.metadata, "grader_version": self._spec.grader_version}
        asked = Asked(message_id(request.idempotency_key), replace(request, metadata=metadata))
        try:
            call = self._call([asked])
        except (TypeError, ValueError, RecursionError) as error:
            return failed(GradeFailure.REQUEST_INVALID, f"The row cannot be sent as JSON: {type(error).__name__}.", attempts=0)
        if self._grouper is None:
            return (await self._service.ask(call)).grade
        try:
            return await self._grouper.grade(asked)
        except LimitsUnavailable as error:
            return failed(GradeFailure.LIMITS_UNAVAILABLE, error.message, attempts=0)

    async def close(self) -> None:
        if self._grouper is not None:
            await self._grouper.close()
        await self._service.close()

    async def _ask_in_place(self, asked: list[Asked]) -> list[Grade]:
        return (await self._service.ask_in_place(self._call(asked))).grades

    def _call(self, asked: list[Asked]) -> Request:
        """Raises: TypeError, ValueError, RecursionError for what JSON cannot express."""
        body = json.dumps(self._format.payload(asked), allow_nan=False).encode()
        name, ids = call_name(asked), [one.id for one in asked]
        return Request(
            body,
            lambda: self._request_headers(name, body),
            lambda answer: self._format.read(answer, ids, self._spec.reward_range, self._redactor),
            num_grades=len(asked),
        )

    def _request_headers(self, name: str, body: bytes) -> dict[str, str]:
        """Signed anew for each attempt: the id stays, timestamp and signature are fresh."""
        now = time.time()
        signature = {ID_HEADER: name, TIMESTAMP_HEADER: str(int(now))}
        if self._secret.get("signing_secret") is not None:
            previous = self._secret.get("previous_signing_secret") if now < self._secret.get("previous_expires_at", 0.0) else None
            signature = sign(self._secret["signing_secret"], name, int(now), body, previous)
        return {**self._headers, **signature, **common_headers(name)}


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
