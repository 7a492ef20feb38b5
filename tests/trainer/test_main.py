"""The program as the worker starts it: these tests spawn it, because locks, signals and pipes belong to processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from core.redaction import MASK, Redactor, secret_values
from core.run_directory import CONTROL, OUTCOME, SECRETS_FD, Control, End, publish_json, read_outcome, write_control
from tests.trainer.runs import make_run_directory, read_metrics
from trainer.__main__ import has_ended, hold
from trainer.checkpoints import find_resume_point

ROOT = Path(__file__).parents[2]


def start(folder: Path, *arguments: str, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "trainer", str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_the_program_runs_alone_takes_secrets_by_pipe_and_leaves_none_behind(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=2)
    reading, writing = os.pipe()
    process = start(folder, SECRETS_FD, str(reading), pass_fds=(reading,))
    os.close(reading)
    with open(writing, "w") as pipe:
        pipe.write(json.dumps({"secrets": {"inline": {"headers": {"X-Key": "topsecret99"}, "signing_secret": None}}}))
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    outcome = read_outcome(folder)
    assert outcome is not None
    assert (outcome.end, outcome.step) == (End.SUCCEEDED, 2)
    assert len(read_metrics(folder)) == 2
    assert "topsecret99" not in log
    assert not any(b"topsecret99" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_sigterm_ends_it_paused_and_started_again_it_goes_on(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=100_000)
    process = start(folder)
    deadline = time.monotonic() + 100
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_bytes():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    outcome = read_outcome(folder)
    assert process.returncode == 0, log
    assert outcome is not None
    assert outcome.end is End.PAUSED
    done = outcome.step
    publish_json(folder / OUTCOME, outcome)
    write_control(folder, Control.PAUSE)
    assert has_ended(folder) is False
    assert not (folder / CONTROL).exists()
    point = find_resume_point(folder)
    assert point is not None
    assert point.progress.step == done


def test_a_directory_that_another_trainer_holds_is_left_alone(tmp_path: Path) -> None:
    first = hold(tmp_path)
    assert first is not None
    assert hold(tmp_path) is None
    first.close()
    second = hold(tmp_path)
    assert second is not None
    second.close()


def test_the_redactor_masks_whole_values_and_their_long_parts() -> None:
    redactor = Redactor(secret_values({"a": {"headers": {"Authorization": "Bearer abcdefgh12"}, "signing_secret": "whsec_x"}, "b": {}}))
    assert redactor.clean("got abcdefgh12 and whsec_x, a Bearer token") == f"got {MASK} and {MASK}, a Bearer token"
    assert redactor.clean_optional(None) is None
