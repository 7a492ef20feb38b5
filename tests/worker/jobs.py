"""Jobs with real files behind them, and a worker whose trainer is `fake_trainer.py`."""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sqlalchemy import select

from core.grader_specs import PinnedEndpointGrader
from core.options import Options
from core.settings import Settings
from database.base_models import register_model
from database.jobs import get_job, insert_job, mark_validated
from database.models import Event, Job, Metric, Sample
from database.projects import create_project
from database.secrets import ensure_secret_key
from tests.database.rows import new_job
from worker.context import Worker, open_worker

FAKE = Path(__file__).with_name("fake_trainer.py")
SECRETS = {"inline": {"headers": {"authorization": "Bearer hunter2-hunter2"}, "signing_secret": "whsec_c2lnbmluZy1zZWNyZXQ="}}
GRADER = PinnedEndpointGrader(type="endpoint", url="https://grader.example.com/", secret_ref="inline", grader_version="inline")
ROWS = b'{"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}\n' * 12


def make_worker(settings: Settings, plan: dict | None = None, **changes: object) -> Worker:
    """A worker whose trainer follows `plan` (see fake_trainer.DEFAULTS). `changes` are settings."""
    ensure_secret_key(settings)
    settings = settings.model_copy(update={"num_threads": 1, "lease_seconds": 4.0, **changes})
    return open_worker(settings, (sys.executable, str(FAKE), json.dumps(plan or {})))


def with_plan(worker: Worker, plan: dict) -> Worker:
    """Another process on the same host with the same database: it drains by itself."""
    return replace(worker, trainer_command=(sys.executable, str(FAKE), json.dumps(plan)), drain=threading.Event())


def submit(worker: Worker, **changes: object) -> tuple[str, str]:
    """(project id, job id) of a queued job whose model and files are there."""
    model = worker.settings.home / "tiny-model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    blob = worker.blobs.put([ROWS], kind="file")
    with worker.database.transaction() as session:
        project = create_project(session, "team").id
        name = f"tiny-{project}"
        source = {"type": "folder", "path": str(model)}
        register_model(session, name=name, project_id=project, kind="base", source=source, digest="d" * 64)
        values = {"model": name, "training_blob": blob.id, "grader": GRADER, "secrets": worker.secrets.encrypt(SECRETS)}
        job = insert_job(session, new_job(project, **{**values, "options": Options(learning_rate=1e-5, group_size=2), **changes}))
        assert mark_validated(session, job.id, num_training_rows=12, num_validation_rows=3, validation_blob=blob.id, total_steps=4)
    return project, job.id


def read_job(worker: Worker, project: str, job_id: str) -> Job:
    with worker.database.reading() as session:
        return get_job(session, project, job_id)


def read_messages(worker: Worker, job_id: str) -> list[str]:
    """Oldest first."""
    with worker.database.reading() as session:
        return list(session.execute(select(Event.message).where(Event.job_id == job_id).order_by(Event.seq)).scalars())


def read_steps(worker: Worker, job_id: str) -> dict[int, float]:
    """step -> attempt that computed it, of every train metric row `attempt`; the table's key forbids doubles."""
    query = select(Metric.step, Metric.value).where(Metric.job_id == job_id, Metric.name == "attempt")
    with worker.database.reading() as session:
        return dict(session.execute(query).all())


def count_samples(worker: Worker, job_id: str) -> int:
    with worker.database.reading() as session:
        return len(session.execute(select(Sample.seq).where(Sample.job_id == job_id)).all())


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.02)
