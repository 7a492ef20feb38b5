"""What the doorbell starts: claims the best job by SQL until there is none."""

import logging
from functools import lru_cache

from celery import shared_task

from core.doorbell import WAKE
from core.settings import load_settings
from database.leases import Claim, claim_job
from worker.context import Worker, open_worker
from worker.leftovers import remove_old_runs
from worker.runner import run_claimed_job

logger = logging.getLogger("hone.worker")


@lru_cache(maxsize=1)
def this_worker() -> Worker:
    """Opened by the first caller: `celery_app`, before any task runs."""
    return open_worker(load_settings())


def work_until_idle(worker: Worker) -> int:
    """Runs one job after the other until nothing waits or this process is to end; how many."""
    done = 0
    while not worker.drain.is_set() and (claim := claim_next(worker)) is not None:
        job = run_claimed_job(claim, worker)
        logger.info("%s: attempt %d ended, the job is %s", claim.job.id, claim.attempt, "another worker's" if job is None else job.status)
        done += 1
    if not worker.drain.is_set():
        remove_old_runs(worker)
    return done


def claim_next(worker: Worker) -> Claim | None:
    settings = worker.settings
    with worker.database.transaction() as session:
        return claim_job(
            session,
            worker=worker.name,
            host=worker.host,
            device=worker.device,
            gpu_class=settings.gpu_class,
            lease_seconds=settings.lease_seconds,
        )


def _wake() -> None:
    work_until_idle(this_worker())


wake = shared_task(name=WAKE)(_wake)
