"""The same job by `python -m trainer` alone and through `hone up`, with what each used: processor time and moments on the way."""

import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from sqlalchemy import select

from benchmarks.cpu_seconds import read_tree, seconds_by_role, total_seconds
from benchmarks.ppo_vs_grpo import LAST_INTEGER
from benchmarks.trainer_runs import COMMAND, RunFailed, read_metrics
from client.client import Client
from core.folders import folder_digest
from core.grader_specs import PythonGrader
from core.presets import resolve_options
from core.run_directory import JOB, METRICS, MODEL, TRAIN, VALID, ModelSource, ResolvedJob, publish_json
from core.settings import Settings
from database.models import Attempt, Event, Job, Metric
from database.session import Database, open_database
from examples.demo import programs, settings
from examples.demo.programs import Programs
from examples.demo.prompts import Row, as_jsonl, make_rows
from local.home import Home
from local.models import SMOLLM2_NAME
from worker.trainer_process import IDENTITY, start, trainer_environment

POLL_SECONDS = 0.02
NUM_HELD_OUT = 8
LIMIT_SECONDS = 600.0
IDLE_SECONDS = 10.0
OWN_START = "the trainer's own start"
TRAINER = "trainer"
ROLES = {
    TRAINER: "-m trainer ",
    "worker": "worker.celery_app",
    "housekeeping": "housekeeping.celery_app",
    "API": "api.app:app",
    "broker": "valkey",
    "hone up": "local.",
}
ENDED_CHILDREN = {"worker": TRAINER}
CPU = dict[str, float]
"""CPU-seconds by role."""


class Reading(NamedTuple):
    at: float
    cpu: CPU
    """From the beginning of each process on."""


class Used(BaseModel):
    """What one run of the job used."""

    start: CPU
    """Until the first step was written."""

    steps: list[CPU]
    """Of each step after the first."""

    end: CPU
    """After the last step was written."""

    idle: CPU = {}
    """Of one second in which there is nothing to do."""

    seconds_step: float
    shares: dict[str, float] = {}
    """Seconds of each part of the way from the submission to the first step."""

    digest: str
    """Chained over all steps: equal where the same was computed."""

    @property
    def step(self) -> CPU:
        """Mean over `steps`: what is done for several steps at once is spread over them."""
        return {role: statistics.fmean(step[role] for step in self.steps) for role in self.start}


class Workload:
    """`steps` steps of the demo's job: SmolLM2, all weights, 8 questions with 8 completions each."""

    def __init__(self, model: Path, steps: int, num_threads: int) -> None:
        self.model, self.steps, self.num_threads = model, steps, num_threads
        self.hyperparameters = settings.hyperparameters("grpo", steps)
        self.grader = PythonGrader(type="python", source=LAST_INTEGER)
        self.digest = folder_digest(model)
        rows: tuple[list[Row], list[Row]] = make_rows()
        self.training, self.held_out = as_jsonl(rows[0]), as_jsonl(rows[1][:NUM_HELD_OUT])

    def resolved(self) -> ResolvedJob:
        """As the worker hands it to the trainer."""
        return ResolvedJob(
            job_id="benchmark",
            attempt=1,
            algorithm="grpo",
            options=resolve_options("grpo", self.hyperparameters),
            seed=settings.SEED,
            grader=self.grader,
            model=ModelSource(name=SMOLLM2_NAME, digest=self.digest),
            num_threads=self.num_threads,
        )

    def request(self, client: Client, steps: int) -> dict[str, Any]:
        """The body of the job, its files uploaded."""
        files = [client.files.upload_bytes(content, "rows.jsonl")["id"] for content in (self.training, self.held_out)]
        hyperparameters = settings.hyperparameters("grpo", steps)
        reinforcement = {"grader": self.grader.model_dump(exclude_none=True), "algorithm": "grpo", "hyperparameters": hyperparameters}
        return {
            "model": SMOLLM2_NAME,
            "training_file": files[0],
            "validation_file": files[1],
            "method": {"type": "reinforcement", "reinforcement": reinforcement},
            "seed": settings.SEED,
        }


def run_alone(folder: Path, work: Workload) -> Used:
    """Raises: RunFailed."""
    folder.mkdir(parents=True)
    (folder / TRAIN).write_bytes(work.training)
    (folder / VALID).write_bytes(work.held_out)
    (folder / MODEL).symlink_to(work.model.resolve())
    publish_json(folder / JOB, work.resolved())
    before, started = _reaped_seconds(), time.time()
    process = start(COMMAND, folder, {}, trainer_environment(work.num_threads))
    try:
        readings = [Reading(started, {TRAINER: 0.0})]
        for step in range(1, work.steps + 1):
            readings.append(_at_step(folder, step, lambda: {TRAINER: total_seconds(read_tree(process.pid))}, process.has_ended))
        _wait("the trainer's end", process.has_ended)
    finally:
        process.reap(timeout_seconds=10)
    readings.append(Reading(time.time(), {TRAINER: _reaped_seconds() - before}))
    used = used_between(readings, read_metrics(folder, "train")[-1].digest)
    return used.model_copy(update={"shares": {OWN_START: readings[1].at - started}})


@contextmanager
def warm_platform(folder: Path, work: Workload) -> Iterator["RunningPlatform"]:
    """`hone up` whose worker has done a job of one step. Raises: DemoFailed, RunFailed."""
    folder.mkdir(parents=True)
    started = Programs(folder)
    try:
        home = folder / "home"
        url, key = programs.start_platform(started, home)
        root = int(json.loads(Home(home).facts.read_text())["pid"])
        with Client(f"{url}/v1", key) as client:
            client.models.add(SMOLLM2_NAME, {"type": "folder", "path": str(work.model.resolve())}, work.digest)
            platform = RunningPlatform(root, home, client, work)
            platform.run_job(1)
            yield platform
    finally:
        started.stop()


class RunningPlatform:
    def __init__(self, root: int, home: Path, client: Client, work: Workload) -> None:
        self._root, self._home, self._client, self._work = root, home, client, work
        self._database: Database = open_database(Settings(home=home))

    def idle(self) -> CPU:
        """Of one second while nothing is to be done."""
        before = self._read()
        time.sleep(IDLE_SECONDS)
        return _difference(before, self._read(), IDLE_SECONDS)

    def run_job(self, steps: int) -> Used:
        """Raises: RunFailed."""
        body = self._work.request(self._client, steps)
        readings = [Reading(time.time(), self._read())]
        job_id = str(self._client.jobs.create(body)["id"])
        folder = self._home / "runs" / job_id / "1"
        readings.append(_at_step(folder, 1, self._read, lambda: self._has_ended(job_id)))
        spawned = (folder / IDENTITY).stat().st_mtime
        _wait("the first step's metrics in the database", lambda: self._has_metrics(job_id))
        relayed = time.time()
        readings += [_at_step(folder, step, self._read, lambda: self._has_ended(job_id)) for step in range(2, steps + 1)]
        _wait("the job's end", lambda: self._has_ended(job_id))
        readings.append(Reading(time.time(), self._read()))
        used = used_between(readings, self._digest(job_id))
        return used.model_copy(update={"shares": self._shares(job_id, readings[0].at, spawned, readings[1].at, relayed)})

    def _read(self) -> CPU:
        return seconds_by_role(read_tree(self._root), ROLES, ENDED_CHILDREN)

    def _shares(self, job_id: str, submitted: float, spawned: float, first_step: float, relayed: float) -> dict[str, float]:
        with self._database.reading() as session:
            events = session.execute(select(Event).where(Event.job_id == job_id).order_by(Event.seq)).scalars().all()
            claimed = session.execute(select(Attempt.started_at).where(Attempt.job_id == job_id)).scalar_one()
        at = {event.message.split(" ")[0].rstrip(":"): event.created_at for event in reversed(events)}
        moments = {
            "API: check and commit": at["Created"],
            "housekeeping wakes": at["Validating"],
            "validation": at["Files"],
            "the worker claims": claimed,
            "the run directory is filled": spawned,
            OWN_START: first_step,
            "its first metrics are relayed": relayed,
        }
        starts = [submitted, *moments.values()]
        return {name: moment - begin for (name, moment), begin in zip(moments.items(), starts, strict=False)}

    def _has_metrics(self, job_id: str) -> bool:
        with self._database.reading() as session:
            query = select(Metric.seq).where(Metric.job_id == job_id, Metric.phase == "train").limit(1)
            return session.execute(query).first() is not None

    def _has_ended(self, job_id: str) -> bool:
        """Raises: RunFailed for a job that did not succeed."""
        with self._database.reading() as session:
            job = session.get_one(Job, job_id)
        if job.finished_at is not None and job.status != "succeeded":
            raise RunFailed(f"The job is {job.status}: {job.error_message}")
        return job.finished_at is not None

    def _digest(self, job_id: str) -> str:
        return str([entry["digest"] for entry in self._client.jobs.every_digest(job_id)][-1])


def used_between(readings: list[Reading], digest: str) -> Used:
    """`readings`: before the start, at each step, at the end."""
    between = [_difference(before.cpu, after.cpu) for before, after in itertools.pairwise(readings)]
    seconds = readings[-2].at - readings[1].at
    return Used(
        start=between[0],
        steps=between[1:-1] or between[:1],
        end=between[-1],
        seconds_step=seconds / max(1, len(between) - 2),
        digest=digest,
    )


def _difference(before: CPU, after: CPU, times: float = 1) -> CPU:
    """By each of `times`."""
    return {role: (after[role] - before[role]) / times for role in after}


def _reaped_seconds() -> float:
    """CPU-seconds of all that this process has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _at_step(folder: Path, step: int, read: Callable[[], CPU], has_ended: Callable[[], bool]) -> Reading:
    """Right when the metrics of `step` were written. Raises: RunFailed."""
    path, seen = folder / METRICS, -1
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            if size != seen and any(line.step >= step for line in read_metrics(folder, "train")):
                return Reading(time.time(), read())
            seen = size
        if seen < 0 and has_ended():
            break
        time.sleep(POLL_SECONDS)
    raise RunFailed(f"{folder}: no step {step}")


def _wait(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RunFailed(f"{what} did not come")
        time.sleep(POLL_SECONDS)
