"""A grader behind a URL, called and answered in the published wire format, every call signed.

Source: the `single` wire format is the published Azure `endpoint` shape; signatures are Standard Webhooks.
"""

import json
import re
import ssl
import time
from collections.abc import Mapping
from typing import Any

from core.errors import InvalidRequest
from core.grader_specs import PinnedEndpointGrader
from core.redaction import Redactor, secret_values
from graders.calls import Request, RetryPolicy, Service, common_headers, message_id
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.reply import parse_reply
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
        *,
        headers: Mapping[str, str],
        signing_secret: str | None,
        network: NetworkPolicy,
        retry: RetryPolicy | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        check_headers(headers)
        self._spec = spec
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._signing_secret = signing_secret
        self._redactor = Redactor(secret_values({"endpoint": {"headers": headers, "signing_secret": signing_secret}}))
        self._service = Service(spec.url, spec, self._redactor, network, retry=retry, ssl_context=ssl_context)

    async def grade(self, request: GradeRequest) -> Grade:
        name = message_id(request.idempotency_key)
        try:
            body = json.dumps(self._payload(request, name), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return failed(GradeFailure.REQUEST_INVALID, f"The row cannot be sent as JSON: {type(error).__name__}.", attempts=0)
        verdict = await self._service.ask(Request(body, lambda: self._request_headers(name, body), self._read))
        return verdict.grade

    async def close(self) -> None:
        await self._service.close()

    def _payload(self, request: GradeRequest, name: str) -> dict[str, Any]:
        return {
            "sample": request.sample,
            "item": request.item,
            "trace_id": request.trace_id or f"trace_{name[:32]}",
            "metadata": {**request.metadata, "grader_version": self._spec.grader_version},
        }

    def _read(self, body: bytes) -> Grade:
        return parse_reply(body, self._spec.reward_range, self._redactor)

    def _request_headers(self, name: str, body: bytes) -> dict[str, str]:
        """Signed anew for each attempt: the id stays, timestamp and signature are fresh."""
        timestamp = int(time.time())
        if self._signing_secret is None:
            signature = {ID_HEADER: name, TIMESTAMP_HEADER: str(timestamp)}
        else:
            signature = sign(self._signing_secret, name, timestamp, body)
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
