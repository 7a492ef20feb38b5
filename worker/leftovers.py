"""Run directories that nobody needs any more. They lie on the worker's own disk, so the worker removes them."""

import shutil
import time
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.lifecycle import Status, is_terminal
from database.models import Job
from worker.context import Worker

KEPT_SECONDS = 86_400.0
"""How long the directory of a failed or cancelled job stays, for whoever wants to know why."""


def remove_old_runs(worker: Worker) -> int:
    """Removes the directories of jobs that ended a day ago or are not known at all; how many."""
    runs = worker.settings.runs_path
    folders = [folder for folder in runs.iterdir() if folder.is_dir()] if runs.is_dir() else []
    removed = 0
    for folder in folders:
        with worker.database.reading() as session:
            is_needed = _is_needed(session, folder.name)
        if not is_needed and _age(folder) > KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def _is_needed(session: Session, job_id: str) -> bool:
    job = session.execute(select(Job).where(Job.id == job_id)).scalar_one_or_none()
    return job is not None and (not is_terminal(Status(job.status)) or job.lease_token is not None)


def _age(folder: Path) -> float:
    """Seconds since an attempt last began or ended something here."""
    times = [entry.stat().st_mtime for entry in (folder, *folder.iterdir())]
    return time.time() - max(times)
