"""The token guard, and the numbers that order what belongs to a job."""

from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from core.errors import LeaseLost, NotFound
from database.models import Job
from database.sql import clock, update_row


def guard(session: Session, job_id: str, token: str, **changes: Any) -> Job:
    """The job after `changes`, locked until the transaction ends: the UPDATE in which every writer's data must be.

    It tests the token, never the status: the holder of a cancelled job may still store what it has.
    Raises: LeaseLost when `token` is no longer the job's.
    """
    statement = update(Job).where(Job.id == job_id, Job.lease_token == token).values(updated_at=clock(), **changes)
    job = update_row(session, statement, Job)
    if job is None:
        raise LeaseLost(f"The lease on {job_id} was lost: another attempt has the job, or it is over.")
    return job


def take_numbers(session: Session, job_id: str, count: int) -> int:
    """The first of `count` numbers of the job's `seq`. The row stays locked, so numbers become visible in their order.

    Raises: NotFound.
    """
    job = update_row(session, update(Job).where(Job.id == job_id).values(seq=Job.seq + count), Job)
    if job is None:
        raise NotFound(f"Could not find fine tune: {job_id}", code="fine_tune_not_found", param="fine_tune_id")
    return job.seq - count + 1
