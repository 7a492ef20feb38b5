"""Who may write a job: claim, renew, guard, release, expire. Only the database's clock counts.

Status is what the user wants, the lease is who may write. A claim gives a new token; from then on an older token writes nothing.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session, aliased

from core.errors import PlatformError, TrainerCrashed
from core.lifecycle import PauseReason, Status, check_transition, is_terminal
from database.checkpoints import drop_resume_points
from database.guards import guard
from database.jobs import close_attempts, has_live_lease
from database.models import Attempt, Job, ResumePoint
from database.progress import add_event
from database.sql import clock, insert_row, update_row

__all__ = ["Claim", "claim_job", "count_queued", "expire_leases", "guard", "release", "renew_lease"]


@dataclass(frozen=True)
class Claim:
    """A job that this worker holds until the lease expires, and the token that says so."""

    job: Job
    token: str
    attempt: int


def claim_job(session: Session, *, worker: str, host: str, device: str, gpu_class: str, lease_seconds: float) -> Claim | None:
    """The next job that fits `gpu_class`, now running and held by `worker`; None when there is none.

    Projects with the fewest running jobs come first, then priority, then age.
    """
    token = secrets.token_hex(16)
    statement = update(Job).where(Job.id == _next_job(gpu_class), Job.status == Status.QUEUED)
    changes = {
        "status": Status.RUNNING,
        "attempt": Job.attempt + 1,
        "lease_token": token,
        "lease_expires_at": clock() + lease_seconds,
        "worker": worker,
        "started_at": func.coalesce(Job.started_at, clock()),
        "updated_at": clock(),
    }
    job = update_row(session, statement.values(changes), Job)
    if job is None:
        return None
    close_attempts(session, job.id, "lease_expired", before=job.attempt)
    newest_step = select(func.coalesce(func.max(ResumePoint.step), 0)).where(ResumePoint.job_id == job.id).scalar_subquery()
    insert_row(
        session,
        Attempt,
        job_id=job.id,
        attempt=job.attempt,
        worker=worker,
        host=host,
        device=device,
        started_at=clock(),
        from_step=newest_step,
    )
    message = "Fine-tuning job started" if job.attempt == 1 else f"Fine-tuning job started again (attempt {job.attempt})"
    add_event(session, job.id, level="info", message=message, attempt=job.attempt)
    return Claim(job, token, job.attempt)


def renew_lease(session: Session, job_id: str, token: str, lease_seconds: float) -> Status:
    """Moves the deadline, even of a lease that has passed if nobody took the job since; says what the user wants now.

    Raises: LeaseLost.
    """
    return Status(guard(session, job_id, token, lease_expires_at=clock() + lease_seconds).status)


def release(
    session: Session,
    job_id: str,
    token: str,
    *,
    max_attempts: int,
    status: Status | None = None,
    error: PlatformError | None = None,
    reason: str,
    from_step: int | None = None,
    to_step: int | None = None,
    **changes: Any,
) -> Job:
    """Ends the attempt and gives the job up. `status` is written only while the job is `running`: a cancelled job stays cancelled.

    Without `status` the error decides: none = back to the queue (a drain); retryable = a fault, back to the queue until
    `max_attempts` faults in a row; else failed. `changes` are columns of the job. Raises: LeaseLost.
    """
    job = guard(session, job_id, token)
    steps = {"to_step": to_step} | ({} if from_step is None else {"from_step": from_step})
    statement = update(Attempt).where(Attempt.job_id == job_id, Attempt.attempt == job.attempt).values(steps)
    session.execute(statement, execution_options={"synchronize_session": False})
    return _end_attempt(session, job, status, error, reason, max_attempts, changes)


def expire_leases(session: Session, *, max_attempts: int) -> int:
    """Ends the attempts whose lease has passed; how many jobs went back to the queue."""
    query = select(Job).where(Job.lease_expires_at <= clock()).with_for_update(skip_locked=True)
    expired = list(session.execute(query, execution_options={"populate_existing": True}).scalars())
    error = TrainerCrashed("The worker stopped answering: its lease on the job passed.", code="worker_lost")
    ended = [_end_attempt(session, job, None, error, "lease_expired", max_attempts, {}) for job in expired]
    return sum(job.status == Status.QUEUED for job in ended)


def count_queued(session: Session) -> int:
    """Jobs that a worker could claim now."""
    query = select(func.count()).select_from(Job).where(Job.status == Status.QUEUED, ~has_live_lease())
    return session.execute(query).scalar_one()


def _next_job(gpu_class: str) -> Any:
    queued, running = aliased(Job), aliased(Job)
    share = select(func.count()).where(running.project_id == queued.project_id, running.status == Status.RUNNING).scalar_subquery()
    is_free = or_(queued.lease_token.is_(None), queued.lease_expires_at <= clock())
    query = select(queued.id).where(queued.status == Status.QUEUED, is_free, queued.gpu_class.in_(("any", gpu_class)))
    query = query.order_by(share, queued.priority.desc(), queued.created_at, queued.id).limit(1)
    return query.with_for_update(skip_locked=True).scalar_subquery()


def _end_attempt(
    session: Session, job: Job, status: Status | None, error: PlatformError | None, reason: str, max_attempts: int, changes: dict[str, Any]
) -> Job:
    """The job without a holder, in the status that the end of its attempt means. `job` is locked by this transaction.

    A fault in a wind-down that the user asked for counts for nothing.
    """
    current = Status(job.status)
    is_fault = current == Status.RUNNING and error is not None and error.retryable and status in (None, Status.QUEUED)
    failures = job.failures + is_fault
    target = current
    if current == Status.RUNNING:
        target = _status_after(status, error, is_exhausted=is_fault and failures >= max_attempts)
        check_transition(current, target)
    if target == Status.PAUSED and current == Status.RUNNING:
        changes = {"pause_reason": PauseReason.USER, **changes}
    else:
        changes = {name: value for name, value in changes.items() if name != "pause_reason"}
    if target == Status.FAILED and error is not None:
        changes |= {"error_code": error.code, "error_message": error.message, "error_param": error.param}
    ended = {"lease_token": None, "lease_expires_at": None, "worker": None, "estimated_finish": None, "updated_at": clock()}
    if is_terminal(target):
        ended["finished_at"] = clock()
        drop_resume_points(session, job.id)
    statement = update(Job).where(Job.id == job.id).values(status=target, failures=failures, **ended, **changes)
    ended_job = update_row(session, statement, Job)
    assert ended_job is not None, "the row is locked by this transaction"
    close_attempts(session, job.id, reason)
    _tell(session, ended_job, current, error, reason)
    return ended_job


def _status_after(status: Status | None, error: PlatformError | None, *, is_exhausted: bool) -> Status:
    if is_exhausted:
        return Status.FAILED
    if status is not None:
        return status
    return Status.QUEUED if error is None or error.retryable else Status.FAILED


def _tell(session: Session, job: Job, before: Status, error: PlatformError | None, reason: str) -> None:
    """One event about how the attempt ended; none where the user was told already (cancel, pause)."""
    data = {"reason": reason, **(error.as_dict() if error is not None else {})}
    why = reason if error is None else error.message
    if before != Status.RUNNING:
        return
    if job.status == Status.SUCCEEDED:
        add_event(session, job.id, level="info", message="The job has successfully completed", attempt=job.attempt)
    elif job.status == Status.FAILED:
        add_event(session, job.id, level="error", message=why, data=data, attempt=job.attempt)
    else:
        message = f"Attempt {job.attempt} ended, the job is {job.status}: {why}"
        add_event(session, job.id, level="info" if error is None else "warn", message=message, data=data, attempt=job.attempt)
