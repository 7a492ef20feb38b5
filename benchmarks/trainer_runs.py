"""Real runs of `python -m trainer`, made and followed without worker or database. The run directory is the record of what was measured."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from core.run_directory import (
    CHECKPOINTS,
    JOB,
    LOG,
    METRICS,
    MODEL,
    TRAIN,
    VALID,
    End,
    MetricsLine,
    ResolvedJob,
    publish_json,
    read_outcome,
)
from examples.demo.progress import Progress
from examples.demo.prompts import Row, as_jsonl
from worker.trainer_process import start, trainer_environment

COMMAND = (sys.executable, "-m", "trainer")
POLL_SECONDS = 1.0
LOG_END = 2000


class RunFailed(Exception):
    """The trainer did not do what the job asks; the message ends with its log."""


def ensure_run(folder: Path, job: ResolvedJob, model: Path, training: list[Row], held_out: list[Row]) -> None:
    """`folder` with the finished run of `job`: as it lies there, or made now, from the start. Raises: RunFailed."""
    if has_succeeded(folder, job):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / TRAIN).write_bytes(as_jsonl(training))
    if held_out:
        (folder / VALID).write_bytes(as_jsonl(held_out))
    (folder / MODEL).symlink_to(model.resolve())
    publish_json(folder / JOB, job)
    _train(folder, job)
    shutil.rmtree(folder / CHECKPOINTS)


def has_succeeded(folder: Path, job: ResolvedJob) -> bool:
    """Whether `folder` holds the whole run of just this job. Job files of other versions need not parse."""
    if not (folder / JOB).exists() or json.loads((folder / JOB).read_text()) != job.model_dump(mode="json"):
        return False
    outcome = read_outcome(folder)
    return outcome is not None and outcome.end is End.SUCCEEDED


def read_metrics(folder: Path, phase: str) -> list[MetricsLine]:
    """Whole lines only: the trainer may be writing."""
    path = folder / METRICS
    text = path.read_text() if path.exists() else ""
    lines = [MetricsLine.model_validate_json(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line.phase == phase]


def _train(folder: Path, job: ResolvedJob) -> None:
    assert job.options.max_steps is not None
    progress = Progress(job.options.max_steps)
    process = start(COMMAND, folder, {}, trainer_environment(job.num_threads))
    try:
        while not process.has_ended():
            progress.take(_points(folder))
            progress.show()
            time.sleep(POLL_SECONDS)
    finally:
        process.reap(timeout_seconds=10)
    progress.take(_points(folder))
    progress.say(progress.line())
    if not has_succeeded(folder, job):
        outcome = read_outcome(folder)
        log = (folder / LOG).read_text(errors="replace")[-LOG_END:]
        raise RunFailed(f"{folder}: {outcome.message if outcome else 'the trainer died'}\n{log}")


def _points(folder: Path) -> list[dict[str, Any]]:
    return [
        {"phase": line.phase, "step": line.step, "name": name, "value": value}
        for line in read_metrics(folder, "train")
        for name, value in line.values.items()
    ]
