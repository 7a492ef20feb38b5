"""Which run directories are removed: only those that nobody can need any more."""

import os
import time
from pathlib import Path

import pytest

from core.settings import Settings
from database.jobs import cancel_job
from tests.worker.jobs import make_worker, submit
from worker.context import Worker
from worker.leftovers import KEPT_SECONDS, remove_old_runs


def make_run(worker: Worker, name: str, *, is_old: bool) -> Path:
    attempt = worker.settings.runs_path / name / "1"
    attempt.mkdir(parents=True)
    if is_old:
        then = time.time() - KEPT_SECONDS - 60
        for folder in (attempt, attempt.parent):
            os.utime(folder, (then, then))
    return attempt.parent


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_directory_of_a_job_that_ended_a_day_ago_is_removed_and_no_other(settings: Settings) -> None:
    worker = make_worker(settings)
    (_, waiting), (project, ended), (other, just_ended) = (submit(worker) for _ in range(3))
    with worker.database.transaction() as session:
        cancel_job(session, project, ended)
        cancel_job(session, other, just_ended)
    kept = [make_run(worker, waiting, is_old=True), make_run(worker, just_ended, is_old=False)]
    gone = [make_run(worker, ended, is_old=True), make_run(worker, "ftjob-unknown", is_old=True)]
    assert remove_old_runs(worker) == 2
    assert [folder.exists() for folder in kept + gone] == [True, True, False, False]
    assert remove_old_runs(worker) == 0
