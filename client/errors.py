"""What can go wrong between this client and the API, one class per kind of answer."""

from typing import Any


class ClientError(Exception):
    """Everything that this client raises."""


class ConnectionFailed(ClientError):
    """No answer: nothing listens there, or the time is over."""


class ApiError(ClientError):
    """An answer of the API that says no."""

    def __init__(self, message: str, *, status: int, code: str | None, param: str | None, request_id: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id

    def __str__(self) -> str:
        facts = [f"{name} {value}" for name, value in (("code", self.code), ("param", self.param), ("request", self.request_id)) if value]
        return f"{self.message} ({', '.join([str(self.status), *facts])})"


class BadRequest(ApiError):
    """400 and the other answers that say the request itself is wrong."""


class NotAuthenticated(ApiError):
    """401: no key, or one that is unknown or revoked."""


class PermissionDenied(ApiError):
    """403: the key's scopes do not allow this."""


class NotFound(ApiError):
    """404."""


class RateLimited(ApiError):
    """429."""


class ServerError(ApiError):
    """5xx: not the caller's fault."""


_CLASSES: dict[int, type[ApiError]] = {401: NotAuthenticated, 403: PermissionDenied, 404: NotFound, 429: RateLimited}


def api_error(status: int, body: Any) -> ApiError:
    """The exception for an answer with this status. `body` is its JSON, or its text when it is none of ours."""
    error = body.get("error") if isinstance(body, dict) else None
    fields: dict[str, Any] = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or f"The server answered {status}: {str(body)[:200]}")
    request_id = body.get("request_id") if isinstance(body, dict) else None
    error_class = ServerError if status >= 500 else _CLASSES.get(status, BadRequest)
    return error_class(message, status=status, code=fields.get("code"), param=fields.get("param"), request_id=request_id)
