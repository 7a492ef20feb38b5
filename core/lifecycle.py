"""The statuses of a job and the one table of the changes between them."""

from enum import StrEnum

from core.errors import InvalidTransition


class Status(StrEnum):
    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PauseReason(StrEnum):
    USER = "user"
    GRADER_UNAVAILABLE = "grader_unavailable"
    LIMIT = "limit"
    DISK_FULL = "disk_full"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.VALIDATING_FILES: frozenset({Status.QUEUED, Status.FAILED, Status.CANCELLED}),
    Status.QUEUED: frozenset({Status.RUNNING, Status.PAUSED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.PAUSED, Status.QUEUED}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}

TERMINAL = frozenset(status for status, targets in TRANSITIONS.items() if not targets)

REFUSAL_CODES = {Status.CANCELLED: "job_not_cancellable", Status.PAUSED: "job_not_pausable", Status.QUEUED: "job_not_resumable"}


def is_terminal(status: Status) -> bool:
    return status in TERMINAL


def sources_of(target: Status) -> frozenset[Status]:
    """Every status from which `target` may be reached: the WHERE clause of a guarded change."""
    return frozenset(status for status, targets in TRANSITIONS.items() if target in targets)


def check_transition(current: Status, target: Status) -> None:
    """Raises: InvalidTransition naming both statuses."""
    if target not in TRANSITIONS[current]:
        code = REFUSAL_CODES.get(target)
        raise InvalidTransition(f"The job is '{current}', so it cannot become '{target}'.", code=code, param="status")
