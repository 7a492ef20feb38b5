"""Trainers as processes of their own: run to the end, killed on the way, and continued by another process, here or elsewhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.run_directory import (
    JOB,
    LOG,
    METRICS,
    MODEL,
    RESUME,
    RESUME_POINTS,
    REWARDS,
    SECRETS_FD,
    TRAIN,
    VALID,
    End,
    MetricsLine,
    ResolvedJob,
    publish_json,
    published,
    read_manifest,
    read_outcome,
    whole_lines,
)
from tests.resume.killed_trainer import KILLED, Fault
from tests.resume.places import assert_inside
from worker.prepare import is_whole

ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MAX_SECONDS = 240.0
Secrets = dict[str, dict[str, Any]]


class EndedTooEarly(Exception):
    """The run was over before its random time came."""


@dataclass(frozen=True)
class RandomKill:
    """A SIGKILL from outside, `seconds` after the process has logged the end of its `after_steps`-th step."""

    after_steps: int
    seconds: float

    def __str__(self) -> str:
        return f"random: {1000 * self.seconds:.0f} ms after its step {self.after_steps}"


def run_to_end(directory: Path, secrets: Secrets | None = None) -> None:
    """`python -m trainer` as anyone would start it."""
    with started(["trainer", str(directory)], directory, secrets) as process:
        status = process.wait(MAX_SECONDS)
    outcome = read_outcome(directory)
    assert status == 0, log_of(directory)
    assert outcome is not None, log_of(directory)
    assert outcome.end is End.SUCCEEDED, outcome


def kill_at(fault: Fault, directory: Path, secrets: Secrets | None = None) -> None:
    """The trainer that kills itself at `fault`. Fails where it dies otherwise, or where the disk says that it was elsewhere."""
    program = ["tests.resume.killed_trainer", json.dumps(asdict(fault)), str(directory)]
    with started(program, directory, secrets) as process:
        status = process.wait(MAX_SECONDS)
    assert status == -signal.SIGKILL, f"{fault} of step {fault.step}: ended with {status}\n{log_of(directory)}"
    told = json.loads((directory / KILLED).read_text().splitlines()[-1])
    assert told == {**asdict(fault), "pid": process.pid}
    assert_inside(fault, directory, steps_done(directory))


def kill_at_random(kill: RandomKill, directory: Path) -> None:
    """A plain trainer, killed from outside. Raises: EndedTooEarly."""
    with started(["trainer", str(directory)], directory, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for _ in range(kill.after_steps):
            while b"trainer: step " not in (line := process.stderr.readline()):
                if not line:
                    raise EndedTooEarly(f"{directory}: {kill}")
        try:
            process.wait(kill.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() == 0:
            raise EndedTooEarly(f"{directory}: {kill}")
        assert process.returncode == -signal.SIGKILL


@contextmanager
def started(program: list[str], directory: Path, secrets: Secrets | None = None, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """`python -m program` with one thread; gone when the block ends. Its log goes into the directory unless `stderr` says otherwise."""
    descriptors = () if secrets is None else (_pipe_with(secrets),)
    arguments = [argument for descriptor in descriptors for argument in (SECRETS_FD, str(descriptor))]
    with open(directory / LOG, "ab") as log:
        command = [sys.executable, "-m", *program, *arguments]
        given = {"stderr": log, "stdout": log, **options}
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, pass_fds=descriptors, **given)
    for descriptor in descriptors:
        os.close(descriptor)
    with process:
        try:
            yield process
        finally:
            process.kill()


def successor(old: Path, new: Path) -> Path:
    """The next attempt's directory on another host: the inputs, the newest whole resume point and the journal, as a worker hands over."""
    new.mkdir()
    job = ResolvedJob.model_validate_json((old / JOB).read_text())
    publish_json(new / JOB, job.model_copy(update={"attempt": job.attempt + 1}))
    for name in (TRAIN, VALID):
        shutil.copy(old / name, new / name)
    shutil.copytree(old / MODEL, new / MODEL)
    point = newest_point(old)
    if point is not None:
        shutil.copytree(point, new / RESUME)
    if (old / REWARDS).exists():
        shutil.copyfile(old / REWARDS, new / REWARDS)
    return new


def newest_point(directory: Path) -> Path | None:
    candidates = [*reversed(published(directory, RESUME_POINTS)), directory / RESUME]
    return next((folder for folder in candidates if is_whole(folder)), None)


def point_step(directory: Path) -> int:
    """Steps done where the directory's run will go on."""
    point = newest_point(directory)
    return 0 if point is None else read_manifest(point).step


def steps_done(directory: Path) -> int:
    """Steps whose metrics stand in the directory, or before its beginning."""
    lines = [MetricsLine.model_validate_json(line) for line in whole_lines(directory / METRICS, 0)[0]]
    return max((line.step for line in lines), default=point_step(directory))


def log_of(directory: Path) -> str:
    return (directory / LOG).read_text(errors="replace")[-3000:]


def _pipe_with(secrets: Secrets) -> int:
    reading, writing = os.pipe()
    with open(writing, "w") as pipe:
        pipe.write(json.dumps({"secrets": secrets}))
    return reading
