"""Pure ASGI: a request id on every answer, and bodies that end where the settings say. Knows no route's content."""

import re
from secrets import token_hex

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import REQUEST_ID, PayloadTooLarge, error_response, platform_error_response
from api.services import services_of

UPLOAD_ROUTE = ("POST", "/v1/files")
MULTIPART_OVERHEAD_BYTES = 64 * 1024
"""Room for the boundaries, headers and other fields around an uploaded file."""

_NUL_IN_QUERY = re.compile(rb"%00", re.ASCII)


class RequestIds:
    """Gives every request an id, in `scope["state"]["request_id"]` and in the answer's `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class RefuseNul:
    """400 for a NUL in path or query, which no stored text can hold and PostgreSQL refuses with an error of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ("\x00" in scope["path"] or _NUL_IN_QUERY.search(scope["query_string"])):
            await error_response(scope, 400, "The address holds a NUL character.", code="invalid_value")(scope, receive, send)
            return
        await self._app(scope, receive, send)


class BodyLimit:
    """413 for a body longer than allowed, by its Content-Length at once and otherwise as soon as the bytes exceed it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = _limit_of(scope)
        error = PayloadTooLarge(f"The body may have at most {limit} bytes.")
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            await platform_error_response(scope, error)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise error
            return message

        await self._app(scope, counted, send)


def _limit_of(scope: Scope) -> int:
    settings = services_of(scope["app"]).settings
    is_upload = (scope["method"], scope["path"].rstrip("/")) == UPLOAD_ROUTE
    return settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES if is_upload else settings.max_body_bytes
