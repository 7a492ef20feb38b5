"""Jobs as their project sees them: created, shown, validated, cancelled, paused, resumed. Who trains them is in `leases`."""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, case, exists, func, null, select, update
from sqlalchemy.orm import Session

from core.errors import InvalidTransition, NotFound, PlatformError
from core.grader_specs import PinnedGraderSpec
from core.lifecycle import REFUSAL_CODES, PauseReason, Status, sources_of
from core.options import Options
from database.checkpoints import drop_resume_points
from database.columns import clean_text
from database.models import Attempt, Job
from database.pages import Page
from database.progress import add_event
from database.sql import clock, fetch_page, insert_row, is_sqlite, new_id, update_row


@dataclass(frozen=True)
class NewJob:
    """A request that passed every check of the submit, with all that it names pinned."""

    project_id: str
    model: str
    model_digest: str
    training_file: str
    training_blob: str
    request: dict[str, Any]
    """As it will be echoed: secrets masked."""

    algorithm: str
    options: Options
    grader: PinnedGraderSpec
    seed: int
    secrets: str | None = None
    """`Secrets.encrypt({secret_ref: {"headers": ..., "signing_secret": ...}})` of graders given inline."""

    validation_file: str | None = None
    validation_blob: str | None = None
    response_format: dict[str, Any] | None = None
    suffix: str | None = None
    metadata: dict[str, str] | None = None
    priority: int = 0
    gpu_class: str = "any"


def insert_job(session: Session, new: NewJob) -> Job:
    """The job in `validating_files`, with its first event."""
    values = {name: getattr(new, name) for name in NewJob.__dataclass_fields__ if name not in ("options", "grader", "metadata")}
    metadata = {clean_text(key): clean_text(value) for key, value in (new.metadata or {}).items()}
    job = insert_row(
        session,
        Job,
        id=new_id("ftjob-"),
        status=Status.VALIDATING_FILES,
        created_at=clock(),
        updated_at=clock(),
        options=new.options.model_dump(mode="json"),
        grader=new.grader.model_dump(mode="json"),
        job_metadata=metadata or None,
        attempt=0,
        failures=0,
        seq=0,
        **values,
    )
    add_event(session, job.id, level="info", message=f"Created fine-tuning job: {job.id}")
    return job


def get_job(session: Session, project_id: str, job_id: str) -> Job:
    """Raises: NotFound."""
    query = select(Job).where(Job.id == job_id, Job.project_id == project_id)
    job = session.execute(query, execution_options={"populate_existing": True}).scalar_one_or_none()
    if job is None:
        raise NotFound(f"Could not find fine tune: {job_id}", code="fine_tune_not_found", param="fine_tune_id")
    return job


def list_jobs(
    session: Session, project_id: str, *, after: str | None, limit: int, metadata: dict[str, str] | Literal["null"] | None = None
) -> Page[Job]:
    """Newest first; with all pairs of `metadata`, or without any metadata ("null"). Raises: InvalidRequest for an unknown `after`."""
    query = select(Job).where(Job.project_id == project_id)
    if metadata == "null":
        query = query.where(Job.job_metadata.is_(None))
    elif metadata is not None:
        query = _with_metadata(session, query, metadata)
    return fetch_page(session, query, (Job.created_at, Job.id), after=after, limit=limit, id_column=Job.id)


def list_attempts(session: Session, job_id: str) -> list[Attempt]:
    """Oldest first; `job_id` came from `get_job`."""
    return list(session.execute(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)).scalars())


def cancel_job(session: Session, project_id: str, job_id: str) -> Job:
    """Cancelled at once; over at once, too, unless a worker holds the job: then at its release.

    Raises: NotFound; InvalidTransition (job_not_cancellable) when the job has ended.
    """
    changes = {
        "finished_at": case((has_live_lease(), null()), else_=clock()),
        "lease_token": case((has_live_lease(), Job.lease_token), else_=null()),
        "lease_expires_at": case((has_live_lease(), Job.lease_expires_at), else_=null()),
        "pause_reason": None,
    }
    job = _change_status(session, project_id, job_id, Status.CANCELLED, sources_of(Status.CANCELLED), changes)
    if job.finished_at is not None:
        drop_resume_points(session, job_id)
        close_attempts(session, job_id, "cancelled")
    add_event(session, job_id, level="info", message="Fine-tuning job cancelled")
    return job


def pause_job(session: Session, project_id: str, job_id: str, reason: PauseReason = PauseReason.USER) -> Job:
    """Paused at once; a worker that holds the job winds down and keeps what it did. One that waits for its grader waits for its user now.

    Raises: NotFound, InvalidTransition.
    """
    if reason == PauseReason.USER and (waiting := _keep_paused(session, project_id, job_id)) is not None:
        return waiting
    job = _change_status(session, project_id, job_id, Status.PAUSED, sources_of(Status.PAUSED), {"pause_reason": reason})
    add_event(session, job_id, level="info", message="Fine-tuning job paused")
    return job


def resume_job(session: Session, project_id: str, job_id: str) -> Job:
    """Queued again; starts when no lease is left from before. Raises: NotFound, InvalidTransition."""
    job = _change_status(
        session, project_id, job_id, Status.QUEUED, frozenset({Status.PAUSED}), {"pause_reason": None, "probes": 0, "probe_at": None}
    )
    add_event(session, job_id, level="info", message="Fine-tuning job resumed, moving it to queued state")
    return job


def jobs_to_validate(session: Session, limit: int) -> list[Job]:
    """Oldest first, of every project: for housekeeping."""
    query = select(Job).where(Job.status == Status.VALIDATING_FILES).order_by(Job.created_at, Job.id).limit(limit)
    return list(session.execute(query).scalars())


def mark_validated(
    session: Session,
    job_id: str,
    *,
    num_training_rows: int,
    num_validation_rows: int,
    validation_blob: str | None,
    total_steps: int | None,
    training_blob: str | None = None,
) -> bool:
    """Queues the job; False when it was cancelled or validated meanwhile. A blob (rows held out, and the rest) replaces the pinned one."""
    changes = {
        "status": Status.QUEUED,
        "num_training_rows": num_training_rows,
        "num_validation_rows": num_validation_rows,
        "total_steps": total_steps,
    }
    blobs = {"validation_blob": validation_blob, "training_blob": training_blob}
    changes |= {name: blob for name, blob in blobs.items() if blob is not None}
    return _end_validation(session, job_id, changes, "info", "Files validated, moving job to queued state")


def fail_job(session: Session, job_id: str, error: PlatformError) -> bool:
    """Ends a job whose files do not pass; False when it was cancelled or validated meanwhile."""
    changes = {
        "status": Status.FAILED,
        "finished_at": clock(),
        "error_code": error.code,
        "error_message": error.message,
        "error_param": error.param,
    }
    return _end_validation(session, job_id, changes, "error", error.message, error.as_dict())


def has_live_lease() -> ColumnElement[bool]:
    return and_(Job.lease_token.is_not(None), Job.lease_expires_at > clock())


def close_attempts(session: Session, job_id: str, reason: str, *, before: int | None = None) -> None:
    """Ends the job's open attempts (those below `before`): their worker will not."""
    statement = update(Attempt).where(Attempt.job_id == job_id, Attempt.ended_at.is_(None))
    if before is not None:
        statement = statement.where(Attempt.attempt < before)
    session.execute(statement.values(ended_at=clock(), reason=reason), execution_options={"synchronize_session": False})


def _keep_paused(session: Session, project_id: str, job_id: str) -> Job | None:
    """The job, no longer to be resumed by a probe; None where it does not wait for one."""
    is_waiting = and_(Job.status == Status.PAUSED, Job.pause_reason == PauseReason.GRADER_UNAVAILABLE)
    statement = update(Job).where(Job.id == job_id, Job.project_id == project_id, is_waiting)
    job = update_row(session, statement.values(pause_reason=PauseReason.USER, updated_at=clock()), Job)
    if job is not None:
        add_event(session, job_id, level="info", message="Fine-tuning job stays paused until it is resumed")
    return job


def _change_status(
    session: Session, project_id: str, job_id: str, target: Status, sources: frozenset[Status], changes: dict[str, Any]
) -> Job:
    statement = update(Job).where(Job.id == job_id, Job.project_id == project_id, Job.status.in_(sources))
    job = update_row(session, statement.values(status=target, updated_at=clock(), **changes), Job)
    if job is None:
        current = get_job(session, project_id, job_id).status
        raise InvalidTransition(f"The job is '{current}', so it cannot become '{target}'.", code=REFUSAL_CODES[target], param="status")
    return job


def _end_validation(
    session: Session,
    job_id: str,
    changes: dict[str, Any],
    level: Literal["info", "error"],
    message: str,
    data: dict[str, Any] | None = None,
) -> bool:
    statement = update(Job).where(Job.id == job_id, Job.status == Status.VALIDATING_FILES)
    job = update_row(session, statement.values(updated_at=clock(), **changes), Job)
    if job is None:
        return False
    add_event(session, job_id, level=level, message=message, data=data)
    return True


def _with_metadata(session: Session, query: Select[Job], metadata: dict[str, str]) -> Select[Job]:
    each = func.json_each if is_sqlite(session) else func.json_each_text
    for key, value in metadata.items():
        pair = each(Job.job_metadata).table_valued("key", "value")
        query = query.where(exists(select(1).select_from(pair).where(pair.c.key == clean_text(key), pair.c.value == clean_text(value))))
    return query
