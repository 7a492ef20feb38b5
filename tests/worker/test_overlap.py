"""The trainer never waits for the worker's errands: it goes on while a checkpoint cannot be uploaded and while no row can be written."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, text

from core.lifecycle import Status
from core.run_directory import CHECKPOINTS, METRICS, published
from core.settings import Settings
from database.checkpoints import list_checkpoints
from database.models import BlobManifest, Job
from database.session import writing
from tests.worker.jobs import count_samples, make_worker, read_job, read_steps, submit, wait_for
from tests.worker.test_runner import finish
from worker.context import Worker
from worker.runner import run_claimed_job
from worker.tasks import claim_next

STEPS = 20
PLAN = {"steps": STEPS, "seconds": 0.03, "checkpoint_every": 5, "resume_every": 100}


@contextmanager
def write_lock(engine: Engine, table: type) -> Iterator[None]:
    """Whoever would write to `table` (on SQLite: to the whole file) waits; readers do not."""
    with writing(engine) as session:
        session.connection()  # SQLite begins here
        if engine.dialect.name == "postgresql":
            session.execute(text(f"LOCK TABLE {table.__tablename__} IN EXCLUSIVE MODE"))
        yield


def run_claimed(worker: Worker) -> tuple[str, str, threading.Thread]:
    """(project id, job id, the attempt): claimed, and about to start."""
    project, job_id = submit(worker)
    return project, job_id, threading.Thread(target=run_claimed_job, args=(claim_next(worker), worker), daemon=True)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoint_steps(worker: Worker, job_id: str) -> list[int]:
    with worker.database.reading() as session:
        return [checkpoint.step for checkpoint in list_checkpoints(session, job_id, after=None, limit=100).items]


def test_later_steps_are_trained_and_shown_while_the_upload_of_a_checkpoint_is_held(settings: Settings) -> None:
    worker = make_worker(settings, PLAN, lease_seconds=120.0)
    project, job_id, attempt = run_claimed(worker)
    with write_lock(worker.database.blob_engine, BlobManifest):
        attempt.start()
        wait_for(lambda: len(read_steps(worker, job_id)) == STEPS)
        assert len(published(worker.settings.runs_path / job_id / "1", CHECKPOINTS)) == STEPS / 5
        assert checkpoint_steps(worker, job_id) == []
    finish(attempt)
    assert read_job(worker, project, job_id).status == Status.SUCCEEDED
    assert checkpoint_steps(worker, job_id) == [20, 15, 10, 5]


def test_steps_are_trained_while_no_row_can_be_written_and_each_is_stored_once_when_it_can(settings: Settings) -> None:
    worker = make_worker(settings, PLAN, lease_seconds=120.0)
    project, job_id, attempt = run_claimed(worker)
    with write_lock(worker.database.engine, Job):
        attempt.start()
        wait_for(lambda: num_lines(worker.settings.runs_path / job_id / "1" / METRICS) == STEPS)
        assert read_steps(worker, job_id) == {}
    finish(attempt)
    assert read_job(worker, project, job_id).status == Status.SUCCEEDED
    assert read_steps(worker, job_id) == dict.fromkeys(range(1, STEPS + 1), 1.0)
    assert count_samples(worker, job_id) == 2 * STEPS
