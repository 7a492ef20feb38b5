"""One tree of errors for every room. Knows no HTTP: `api/errors.py` maps classes to statuses."""

from collections.abc import Iterator
from contextlib import contextmanager


class PlatformError(Exception):
    """What went wrong, in a form that may be shown to the user who caused it or is hit by it."""

    code = "internal_error"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retryable = type(self).retryable if retryable is None else retryable

    def as_dict(self) -> dict[str, str | None]:
        """The three fields that a job row, an event and an API answer share."""
        return {"code": self.code, "message": self.message, "param": self.param}


class InvalidRequest(PlatformError):
    code = "invalid_value"


class NotFound(PlatformError):
    code = "not_found"


class NotAuthenticated(PlatformError):
    code = "invalid_api_key"


class NotAuthorized(PlatformError):
    code = "permission_denied"


class Conflict(PlatformError):
    code = "conflict"


class InvalidTransition(Conflict):
    """A change of status that the table of transitions does not have (code `job_not_cancellable`, ...)."""

    code = "invalid_transition"


class IdempotencyKeyReused(Conflict):
    code = "idempotency_key_reused"


class LeaseLost(PlatformError):
    """The token is no longer the job's: another attempt owns it, so this writer must stop."""

    code = "lease_lost"


class StorageError(PlatformError):
    """A blob is missing, damaged or could not be written."""

    code = "storage_error"
    retryable = True


class GraderError(PlatformError):
    """A grade could not be had. Never turned into a number."""

    code = "grader_error"


class GraderTimeout(GraderError):
    code = "grader_timeout"
    retryable = True


class InvalidGrade(GraderError):
    """The grader answered, but not with a usable number."""

    code = "invalid_grade"


class GraderUnavailable(GraderError):
    code = "grader_unavailable"
    retryable = True


class TrainingError(PlatformError):
    code = "training_error"


class PreflightFailed(TrainingError):
    """A property that training rests on does not hold for this model and these options."""

    code = "preflight_failed"


class Diverged(TrainingError):
    code = "diverged"


class OutOfMemory(TrainingError):
    code = "out_of_memory"


class TrainerCrashed(TrainingError):
    code = "trainer_crashed"
    retryable = True


class TrainerStalled(TrainingError):
    code = "trainer_stalled"
    retryable = True


@contextmanager
def boundary(error: type[PlatformError], what: str) -> Iterator[None]:
    """Turns a foreign exception at an edge into `error`; ours pass through unchanged."""
    try:
        yield
    except PlatformError:
        raise
    except Exception as cause:
        raise error(f"{what}: {type(cause).__name__}: {cause}") from cause
