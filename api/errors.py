"""The one place where an error becomes an HTTP status, and the one error body: {"error": {message, type, param, code}, "request_id"}."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from core.errors import Conflict, GraderError, InvalidRequest, NotAuthenticated, NotAuthorized, NotFound, PlatformError, StorageError

logger = logging.getLogger("hone.api")
REQUEST_ID = "x-request-id"


class PayloadTooLarge(InvalidRequest):
    code = "request_too_large"


class RequestTimeout(PlatformError):
    """The client stopped sending in the middle of its request."""

    code = "request_timeout"


class ServiceUnavailable(PlatformError):
    """The database cannot be reached or is not prepared yet."""

    code = "service_unavailable"
    retryable = True


class TooManyRequests(PlatformError):
    """A bounded resource is taken; `retry_after_seconds` says when to come again."""

    code = "rate_limit_exceeded"
    retry_after_seconds = 2


STATUSES: dict[type[PlatformError], int] = {
    InvalidRequest: 400,
    Conflict: 400,
    GraderError: 400,
    NotAuthenticated: 401,
    NotAuthorized: 403,
    NotFound: 404,
    RequestTimeout: 408,
    PayloadTooLarge: 413,
    TooManyRequests: 429,
    StorageError: 503,
    ServiceUnavailable: 503,
    PlatformError: 500,
}
ROUTER_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: PayloadTooLarge.code}


def status_of(error: PlatformError) -> int:
    """The status of the nearest class in `error`'s chain."""
    return next(STATUSES[cls] for cls in type(error).__mro__ if cls in STATUSES)


def error_type(status: int) -> str:
    """The word that OpenAI's clients know for this status."""
    if status == 429:
        return "requests"
    return "server_error" if status >= 500 else "invalid_request_error"


def error_body(status: int, message: str, *, code: str | None, param: str | None, request_id: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}, "request_id": request_id}


def request_id_of(scope: Mapping[str, Any]) -> str:
    """The id that `RequestIds` gave this request."""
    return str(scope.get("state", {}).get("request_id", ""))


def error_response(
    scope: Mapping[str, Any],
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    request_id = request_id_of(scope)
    body = error_body(status, message, code=code, param=param, request_id=request_id)
    return JSONResponse(body, status_code=status, headers={**(headers or {}), REQUEST_ID: request_id})


def platform_error_response(scope: Mapping[str, Any], error: PlatformError) -> JSONResponse:
    """The answer for one of ours. The text of a server's fault stays in the log."""
    status = status_of(error)
    if status == 500:
        logger.error("request failed", exc_info=error, extra={"request_id": request_id_of(scope)})
        return _internal_error(scope)
    return error_response(scope, status, error.message, code=error.code, param=error.param, headers=_headers(status, error))


def _headers(status: int, error: PlatformError) -> dict[str, str]:
    """What tells a client whether and when to try again."""
    if isinstance(error, TooManyRequests):
        return {"Retry-After": str(error.retry_after_seconds)}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"x-should-retry": "false"} if status >= 500 and not error.retryable else {}


def _internal_error(scope: Mapping[str, Any]) -> JSONResponse:
    return error_response(scope, 500, "The server had an error while processing your request.", code=PlatformError.code)


async def on_platform_error(request: Request, error: PlatformError) -> JSONResponse:
    return platform_error_response(request.scope, error)


async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    """What FastAPI finds in path and query: 400 with the parameter's own name."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    if first["type"] == "missing":
        return error_response(request.scope, 400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    code = "invalid_type" if first["type"].endswith(("_type", "_parsing")) else "invalid_value"
    return error_response(request.scope, 400, f"'{param}': {first['msg']}.", code=code, param=param)


async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    """What the router itself refuses: unknown paths, wrong methods."""
    status = error.status_code
    message = f"{error.detail}: {request.method} {request.url.path}" if status in (404, 405) else str(error.detail)
    return error_response(request.scope, status, message, code=ROUTER_CODES.get(status, "invalid_request"), headers=error.headers)


async def on_disconnect(request: Request, error: ClientDisconnect) -> JSONResponse:
    """Nobody reads this; it keeps a hang-up out of the log of failures."""
    return error_response(request.scope, 400, "The client closed the connection.", code="client_disconnected")


async def on_database_error(request: Request, error: Exception) -> JSONResponse:
    """The database is away, locked for too long, or all its connections are in use."""
    logger.error("database unavailable", exc_info=error, extra={"request_id": request_id_of(request.scope)})
    return platform_error_response(request.scope, ServiceUnavailable("The database cannot be reached now. Try again."))


async def on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """The traceback is logged by the server, never sent."""
    return _internal_error(request.scope)


def install_error_handlers(app: FastAPI) -> None:
    handlers: dict[type[Exception], Any] = {
        PlatformError: on_platform_error,
        RequestValidationError: on_validation_error,
        HTTPException: on_http_exception,
        ClientDisconnect: on_disconnect,
        OperationalError: on_database_error,
        PoolTimeout: on_database_error,
        Exception: on_unexpected_error,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)
