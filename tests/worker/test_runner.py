"""The whole way of an attempt, with a real process in the trainer's place: what must hold is what files, signals and rows say."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from core.lifecycle import Status
from core.run_directory import CHECKPOINTS, METRICS, RESUME_POINTS
from core.settings import Settings
from database.base_models import get_model
from database.checkpoints import checkpoint_files, list_checkpoints, newest_resume_point
from database.jobs import cancel_job, list_attempts, pause_job, resume_job
from database.leases import Claim, claim_job
from database.models import Job
from database.progress import list_events
from tests.worker.jobs import (
    SECRETS,
    count_samples,
    make_worker,
    read_job,
    read_messages,
    read_steps,
    submit,
    wait_for,
    with_plan,
)
from worker.context import Worker
from worker.runner import run_claimed_job
from worker.tasks import claim_next, work_until_idle

LONG = {"steps": 100_000, "seconds": 0.02, "checkpoint_every": 100_000}


def run_in_thread(worker: Worker) -> threading.Thread:
    thread = threading.Thread(target=work_until_idle, args=(worker,), daemon=True)
    thread.start()
    return thread


def finish(thread: threading.Thread, seconds: float = 30.0) -> None:
    thread.join(seconds)
    assert not thread.is_alive(), "the worker did not come free"


def take_away(worker: Worker, job_id: str) -> None:
    """The lease passes, and the sweep gives the job back."""
    with worker.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(status=Status.QUEUED, lease_expires_at=1.0))


def take_over(worker: Worker, job_id: str) -> Claim:
    """As `take_away`, and `worker` claims the job before the old holder's heartbeat can renew what nobody has taken yet."""
    with worker.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(status=Status.QUEUED, lease_expires_at=1.0))
        claim = claim_job(session, worker="other", host="h", device="cpu", gpu_class="any", lease_seconds=60)
    assert claim is not None
    return claim


def pids_in(directory: Path) -> list[int]:
    """Living processes that have `directory` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                is_here = str(directory).encode() in (entry / "cmdline").read_bytes()
                is_alive = (entry / "stat").read_text().rpartition(") ")[2][0] != "Z"
            except OSError:
                continue
            if is_here and is_alive:
                found.append(int(entry.name))
    return found


def test_job_runs_to_its_end_and_leaves_model_metrics_samples_and_no_directory(settings: Settings) -> None:
    worker = make_worker(settings)
    project, job_id = submit(worker)
    assert work_until_idle(worker) == 1
    job = read_job(worker, project, job_id)
    assert (job.status, job.error_code, job.failures, job.trained_tokens) == (Status.SUCCEEDED, None, 0, 400)
    assert job.finished_at is not None
    assert read_steps(worker, job_id) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert count_samples(worker, job_id) == 8
    with worker.database.reading() as session:
        model = get_model(session, project, job.fine_tuned_model)
        (stored,) = checkpoint_files(session, model.checkpoint_id)
        assert newest_resume_point(session, job_id) is None
        assert [checkpoint.step for checkpoint in list_checkpoints(session, job_id, after=None, limit=10).items] == [4, 2]
        assert [(attempt.reason, attempt.to_step) for attempt in list_attempts(session, job_id)] == [("succeeded", 4)]
    assert b"".join(worker.blobs.read(stored.blob)) == bytes([4]) * 1_200_000
    messages = read_messages(worker, job_id)
    assert messages[-2:] == [f"New fine-tuned model created: {job.fine_tuned_model}", "The job has successfully completed"]
    assert not (worker.settings.runs_path / job_id).exists()


def test_trainer_gets_its_secrets_by_pipe_and_sees_none_of_ours(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HONE_DATABASE_URL", "HONE_BROKER_URL", "HONE_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "not-for-trainers")
    worker = make_worker(settings, {"hang_at": 1}, cancel_grace_seconds=0.2)
    project, job_id = submit(worker)
    directory = worker.settings.runs_path / job_id / "1"
    thread = run_in_thread(worker)
    wait_for(lambda: (directory / "beat").exists())
    (pid,) = pids_in(directory)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    on_disk = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
    with worker.database.transaction() as session:
        cancel_job(session, project, job_id)
    finish(thread)
    names = {entry.partition(b"=")[0] for entry in environment.split(b"\0")}
    assert b"not-for-trainers" not in environment
    assert b"PATH" in names
    assert {b"HONE_DATABASE_URL", b"HONE_BROKER_URL", b"HONE_SECRET_KEY", b"HONE_HOME"}.isdisjoint(names)
    for place in (environment, command, on_disk):
        assert b"hunter2" not in place
        assert b"c2lnbmluZy1zZWNyZXQ" not in place
    digest = hashlib.sha256(json.dumps(SECRETS, sort_keys=True).encode()).hexdigest()
    assert f"from step 0 with 12 rows and secrets {digest}" in read_messages(worker, job_id)
    assert oct(directory.stat().st_mode)[-3:] == "700"


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_cancelled_job_with_a_deaf_trainer_frees_the_worker(settings: Settings) -> None:
    worker = make_worker(settings, {"hang_at": 2}, cancel_grace_seconds=0.5)
    project, job_id = submit(worker)
    thread = run_in_thread(worker)
    wait_for(lambda: read_steps(worker, job_id) == {1: 1})
    directory = worker.settings.runs_path / job_id / "1"
    with worker.database.transaction() as session:
        assert cancel_job(session, project, job_id).finished_at is None
    finish(thread, 15)
    job = read_job(worker, project, job_id)
    assert (job.status, job.error_code, job.lease_token) == (Status.CANCELLED, None, None)
    assert job.finished_at is not None
    assert pids_in(directory) == []
    with worker.database.reading() as session:
        assert newest_resume_point(session, job_id) is None
        assert [attempt.reason for attempt in list_attempts(session, job_id)] == ["cancelled"]


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_cancelled_job_ends_by_itself_where_the_trainer_listens(settings: Settings) -> None:
    worker = make_worker(settings, {**LONG}, cancel_grace_seconds=60)
    project, job_id = submit(worker)
    thread = run_in_thread(worker)
    wait_for(lambda: len(read_steps(worker, job_id)) >= 2)
    with worker.database.transaction() as session:
        cancel_job(session, project, job_id)
    finish(thread, 20)
    assert read_job(worker, project, job_id).status == Status.CANCELLED


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_cancelled_queued_job_is_never_claimed(settings: Settings) -> None:
    worker = make_worker(settings)
    project, job_id = submit(worker)
    with worker.database.transaction() as session:
        assert cancel_job(session, project, job_id).finished_at is not None
    assert work_until_idle(worker) == 0


def test_crash_is_retried_from_the_resume_point_without_a_gap_or_a_double(settings: Settings) -> None:
    worker = make_worker(settings, {"attempts": {"1": {"crash_at": 3, "final_words": "segmentation fault"}}})
    project, job_id = submit(worker)
    assert work_until_idle(worker) == 2
    job = read_job(worker, project, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 2)
    assert read_steps(worker, job_id) == {1: 1, 2: 1, 3: 2, 4: 2}
    with worker.database.reading() as session:
        attempts = list_attempts(session, job_id)
        checkpoints = list_checkpoints(session, job_id, after=None, limit=10).items
    assert [(attempt.reason, attempt.from_step) for attempt in attempts] == [("trainer_crashed", 0), ("succeeded", 2)]
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 2]
    assert any("segmentation fault" in message for message in read_messages(worker, job_id))


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_crashes_without_progress_end_as_failure_with_the_clean_end_of_the_log(settings: Settings) -> None:
    worker = make_worker(settings, {"crash_at": 1, "final_words": "Traceback: boom ", "shows_secrets": True}, max_attempts=3)
    project, job_id = submit(worker)
    assert work_until_idle(worker) == 3
    job = read_job(worker, project, job_id)
    assert (job.status, job.error_code, job.failures, job.attempt) == (Status.FAILED, "trainer_crashed", 3, 3)
    with worker.database.reading() as session:
        events = [event.data for event in list_events(session, job_id, after=None, limit=100).items if "log" in event.data]
    assert len(events) == 3
    assert "Traceback: boom" in events[0]["log"]
    assert "Traceback: boom" in job.error_message
    shown = json.dumps(events) + job.error_message
    assert "hunter2" not in shown
    assert "c2lnbmluZy1zZWNyZXQ" not in shown
    assert (worker.settings.runs_path / job_id / "3" / "trainer.log").exists()


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ({"fail_at": 2, "failure": {"code": "diverged", "message": "loss is NaN", "retryable": False}}, "diverged"),
        ({"crash_at": 2, "final_words": "torch.OutOfMemoryError: CUDA out of memory."}, "out_of_memory"),
        ({"garbage_at": 3}, "invalid_trainer_output"),
        ({"claims_model": "step_000009"}, "trainer_crashed"),
    ],
)
@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_what_would_only_happen_again_is_not_retried(settings: Settings, plan: dict, code: str) -> None:
    worker = make_worker(settings, plan)
    project, job_id = submit(worker)
    assert work_until_idle(worker) == 1
    job = read_job(worker, project, job_id)
    assert (job.status, job.error_code) == (Status.FAILED, code)
    assert 1 in read_steps(worker, job_id)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_trainer_without_progress_is_killed_and_retried(settings: Settings) -> None:
    worker = make_worker(settings, {"attempts": {"1": {"hang_at": 2, "touches_progress": False}}}, stall_seconds=1.0)
    project, job_id = submit(worker)
    assert work_until_idle(worker) == 2
    assert read_job(worker, project, job_id).status == Status.SUCCEEDED
    with worker.database.reading() as session:
        assert [attempt.reason for attempt in list_attempts(session, job_id)] == ["trainer_stalled", "succeeded"]


def test_drained_worker_gives_the_job_back_and_another_goes_on(settings: Settings) -> None:
    worker = make_worker(settings, {**LONG, "resume_every": 1000})
    project, job_id = submit(worker)
    thread = run_in_thread(worker)
    wait_for(lambda: len(read_steps(worker, job_id)) >= 2)
    worker.drain.set()
    finish(thread)
    job = read_job(worker, project, job_id)
    assert (job.status, job.failures, job.lease_token) == (Status.QUEUED, 0, None)
    done = max(read_steps(worker, job_id))
    with worker.database.reading() as session:
        assert newest_resume_point(session, job_id).step == done
    shutil.rmtree(worker.settings.runs_path)
    assert work_until_idle(with_plan(worker, {"steps": done + 2})) == 1
    assert read_job(worker, project, job_id).status == Status.SUCCEEDED
    assert read_steps(worker, job_id) == {step: 1.0 if step <= done else 2.0 for step in range(1, done + 3)}


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_job_paused_and_resumed_during_the_wind_down_queues_and_goes_on(settings: Settings) -> None:
    worker = make_worker(settings, {"attempts": {"1": LONG, "2": {**LONG, "steps": 100, "seconds": 0, "resume_every": 1000}}})
    project, job_id = submit(worker)
    thread = run_in_thread(worker)
    wait_for(lambda: len(read_steps(worker, job_id)) >= 2)
    with worker.database.transaction() as session:
        pause_job(session, project, job_id)
    wait_for(lambda: (worker.settings.runs_path / job_id / "1" / "control").exists(), 15)
    with worker.database.transaction() as session:
        resume_job(session, project, job_id)
    finish(thread)
    job = read_job(worker, project, job_id)
    assert (job.status, job.attempt, job.failures) == (Status.SUCCEEDED, 2, 0)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_trainer_that_waits_for_its_grader_pauses_the_job_with_that_reason(settings: Settings) -> None:
    worker = make_worker(settings, {"pause_reason": "grader_unavailable"})
    project, job_id = submit(worker)
    work_until_idle(worker)
    job = read_job(worker, project, job_id)
    assert (job.status, job.pause_reason, job.failures) == (Status.PAUSED, "grader_unavailable", 0)


def test_attempt_whose_lease_went_to_another_kills_its_trainer_and_writes_nothing(settings: Settings) -> None:
    worker = make_worker(settings, {**LONG})
    project, job_id = submit(worker)
    thread = run_in_thread(worker)
    wait_for(lambda: len(read_steps(worker, job_id)) >= 2)
    directory = worker.settings.runs_path / job_id / "1"
    worker.drain.set()
    (pid,) = pids_in(directory)
    os.kill(pid, signal.SIGSTOP)
    other = with_plan(worker, {"steps": 3})
    claim = take_over(other, job_id)
    os.kill(pid, signal.SIGCONT)
    finish(thread)
    assert pids_in(directory) == []
    job = read_job(worker, project, job_id)
    assert (job.status, job.attempt, job.lease_token) == (Status.RUNNING, 2, claim.token)
    before = read_steps(worker, job_id)
    assert set(before.values()) == {1.0}
    shutil.rmtree(directory)
    assert run_claimed_job(claim, other).status == Status.SUCCEEDED


def test_job_of_a_dead_worker_goes_on_from_its_directory_with_every_line(settings: Settings, tmp_path: Path) -> None:
    """The worker dies before it relays a line: what lies in the run directory is all there is."""
    worker = make_worker(settings, {"steps": 6, "attempts": {"1": {"hang_at": 4}}})
    project, job_id = submit(worker)
    claim = claim_next(worker)
    directory = worker.settings.runs_path / job_id / "1"
    script = (
        "import sys, pickle, time; from worker.prepare import prepare; from worker.context import Holding, open_worker;"
        "from worker.trainer_process import start, trainer_environment; from core.settings import load_settings;"
        "from database.leases import Claim; import tests.worker.jobs as jobs;"
        "claim = pickle.load(sys.stdin.buffer); command = tuple(sys.argv[1:]); worker = open_worker(load_settings(), command);"
        "holding = Holding(worker, claim); secrets = prepare(holding).secrets;"
        "start(command, holding.directory, secrets, trainer_environment(1)); time.sleep(60)"
    )
    environment = {**os.environ, "HONE_HOME": str(worker.settings.home), "HONE_DATABASE_URL": worker.settings.database_url}
    with subprocess.Popen([sys.executable, "-c", script, *worker.trainer_command], stdin=subprocess.PIPE, env=environment) as dying:
        dying.stdin.write(pickle.dumps(claim))
        dying.stdin.close()
        wait_for(lambda: (directory / RESUME_POINTS / "step_000003" / "manifest.json").exists())
        wait_for(lambda: len((directory / METRICS).read_bytes().splitlines()) == 3)
        dying.kill()
    wait_for(lambda: len(pids_in(directory)) == 0)
    assert read_steps(worker, job_id) == {}
    take_away(worker, job_id)
    assert work_until_idle(worker) == 1
    assert read_job(worker, project, job_id).status == Status.SUCCEEDED
    assert read_steps(worker, job_id) == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    with worker.database.reading() as session:
        steps = [checkpoint.step for checkpoint in list_checkpoints(session, job_id, after=None, limit=10).items]
    assert steps == [6, 4, 2]


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_damaged_local_resume_point_is_passed_over(settings: Settings) -> None:
    worker = make_worker(settings, {"attempts": {"1": {"kill_at": 4}}})
    _, job_id = submit(worker)
    claim = claim_next(worker)
    assert run_claimed_job(claim, worker).status == Status.QUEUED
    newest = worker.settings.runs_path / job_id / "1" / RESUME_POINTS / "step_000003"
    (newest / "state.json").write_bytes(b"{}")
    with worker.database.transaction() as session:
        session.delete(newest_resume_point(session, job_id))
    assert run_claimed_job(claim_next(worker), worker).status == Status.SUCCEEDED
    assert read_steps(worker, job_id) == {1: 1, 2: 1, 3: 2, 4: 2}


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_checkpoint_that_is_not_what_its_manifest_says_is_not_published(settings: Settings) -> None:
    worker = make_worker(settings, {"steps": 4, "attempts": {"1": {"hang_at": 3, "checkpoint_every": 100}}}, cancel_grace_seconds=0.2)
    project, job_id = submit(worker)
    thread = run_in_thread(worker)
    directory = worker.settings.runs_path / job_id / "1"
    wait_for(lambda: len(read_steps(worker, job_id)) == 2)
    folder = directory / CHECKPOINTS / "step_000002"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"other")
    shutil.copy(directory / RESUME_POINTS / "step_000002" / "manifest.json", folder / "manifest.json.tmp")
    text = (folder / "manifest.json.tmp").read_text().replace("resume_point", "checkpoint").replace("state.json", "weights.bin")
    (folder / "manifest.json").write_text(text)
    time.sleep(1.5)
    with worker.database.transaction() as session:
        cancel_job(session, project, job_id)
    finish(thread)
    with worker.database.reading() as session:
        assert list_checkpoints(session, job_id, after=None, limit=10).items == []
