"""Jobs that paused because their grader was away: whose turn it is to be probed, and what follows from the answer.

Only `paused` with `grader_unavailable` is ever touched: a job that its user paused, resumed or cancelled meanwhile stays as it is.
"""

from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from core.lifecycle import PauseReason, Status
from database.models import Job, Sample
from database.progress import add_event
from database.sql import clock, update_row

MAX_WAIT_SECONDS = 1800.0


def is_probe_due(session: Session) -> bool:
    return session.execute(select(Job.id).where(_is_due()).limit(1)).first() is not None


def take_probe(session: Session, claim_seconds: float) -> Job | None:
    """A job whose grader is to be probed now, for `claim_seconds` nobody else's; the one that waits longest first."""
    query = select(Job.id).where(_is_due()).order_by(func.coalesce(Job.probe_at, 0.0), Job.id).limit(1)
    chosen = query.with_for_update(skip_locked=True).scalar_subquery()
    statement = update(Job).where(Job.id == chosen, _is_waiting())
    return update_row(session, statement.values(probes=Job.probes + 1, probe_at=clock() + claim_seconds), Job)


def put_off_probe(session: Session, job: Job, why: str, probe_seconds: float) -> bool:
    """The next probe of `job`, as `take_probe` gave it, after twice the time of the last; False when nobody waits for it any more."""
    wait = _wait_seconds(job, probe_seconds)
    statement = update(Job).where(Job.id == job.id, _is_waiting()).values(probe_at=clock() + wait)
    if update_row(session, statement, Job) is None:
        return False
    data = {"code": "grader_probed", "probes": job.probes, "next_probe_seconds": wait}
    add_event(session, job.id, level="info", message=f"The grader was probed and is not back: {why} Next in {wait:.0f} s.", data=data)
    return True


def resume_probed(session: Session, job: Job, probe_seconds: float) -> bool:
    """Queues `job` again; False when nobody waits for it any more.

    The count of probes goes on until a step is done, so that a grader which only answers probes is asked ever less often.
    """
    changes = {"status": Status.QUEUED, "pause_reason": None, "probe_at": clock() + _wait_seconds(job, probe_seconds)}
    statement = update(Job).where(Job.id == job.id, _is_waiting()).values(updated_at=clock(), **changes)
    if update_row(session, statement, Job) is None:
        return False
    message = "The grader answers again, moving job to queued state"
    add_event(session, job.id, level="info", message=message, data={"code": "grader_available", "probes": job.probes})
    return True


def graded_sample(session: Session, job_id: str) -> Sample | None:
    """A training completion of the job that its grader could grade."""
    query = select(Sample).where(Sample.job_id == job_id, Sample.phase == "train", Sample.reward.is_not(None))
    return session.execute(query.order_by(Sample.seq.desc()).limit(1)).scalar_one_or_none()


def _wait_seconds(job: Job, probe_seconds: float) -> float:
    return min(MAX_WAIT_SECONDS, probe_seconds * 2.0 ** min(job.probes - 1, 20))


def _is_waiting() -> ColumnElement[bool]:
    return and_(Job.status == Status.PAUSED, Job.pause_reason == PauseReason.GRADER_UNAVAILABLE)


def _is_due() -> Any:
    return and_(_is_waiting(), or_(Job.probe_at.is_(None), Job.probe_at <= clock()))
