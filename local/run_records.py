"""What can be known of a run without its weights: digests, state hashes, metrics, settings. From a run directory or from the API."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import InvalidRequest, NotFound, boundary
from core.run_directory import (
    CHECKPOINTS,
    JOB,
    MANIFEST,
    METRICS,
    RESUME,
    RESUME_POINTS,
    STATE_HASH,
    Manifest,
    MetricsLine,
    ResolvedJob,
    published,
    read_manifest,
    whole_lines,
)
from local.connection import connect

JOB_PREFIX = "ftjob-"
Metrics = dict[str, float | None]


class State(NamedTuple):
    """Where a hash of all weights and optimizer state was taken."""

    kind: str
    """`checkpoint` or `resume_point`: they may hold different things of the same step."""

    step: int


@dataclass(frozen=True)
class RunRecord:
    name: str
    digests: dict[int, str]
    """Step -> chained digest."""

    states: dict[State, str]
    settings: dict[str, Any]
    """What the numbers depend on, as far as it is written down: seed, digest of the model, options, machine."""

    read_metrics: Callable[[int], Metrics]
    """Step -> its training metrics."""


def read_run(place: str) -> RunRecord:
    """`place` is the path of a run directory or the id of a job. Raises: NotFound, InvalidRequest, client.errors.*."""
    folder = Path(place)
    if (folder / JOB).is_file():
        with boundary(InvalidRequest, place):
            return read_directory(folder)
    if place.startswith(JOB_PREFIX):
        return read_job(place)
    raise NotFound(f"'{place}' is neither a run directory (there is no {JOB} in it) nor the id of a job ({JOB_PREFIX}...).")


def read_directory(folder: Path) -> RunRecord:
    """What `python -m trainer` left in `folder`, or is still writing."""
    job = ResolvedJob.model_validate_json((folder / JOB).read_text())
    lines = {line.step: line for line in _training_lines(folder / METRICS)}
    manifests = _manifests(folder)
    model_digest = {"model_digest": job.model.digest} if job.model.digest else {}
    return RunRecord(
        name=str(folder),
        digests={step: line.digest for step, line in lines.items() if line.digest},
        states={State(manifest.kind, manifest.step): manifest.facts[STATE_HASH] for manifest in manifests if STATE_HASH in manifest.facts},
        settings={"seed": job.seed, **model_digest, **job.options.model_dump(mode="json"), **_machine(manifests)},
        read_metrics=lambda step: dict(lines[step].values),
    )


def read_job(job_id: str) -> RunRecord:
    """What the API has of a job."""
    with connect() as client:
        job = client.jobs.retrieve(job_id)
        digests = {entry["step"]: entry["digest"] for entry in client.jobs.every_digest(job_id)}
        states = client.jobs.digests(job_id, limit=1)["states"]
    return RunRecord(
        name=job_id,
        digests=digests,
        states={State(state["kind"], state["step"]): state[STATE_HASH] for state in states},
        settings={"seed": job["seed"], "model_digest": job["model_digest"], **job["options"]},
        read_metrics=lambda step: _job_metrics(job_id, step),
    )


def _training_lines(path: Path) -> Iterator[MetricsLine]:
    offset = 0
    while True:
        raw, offset = whole_lines(path, offset)
        if not raw:
            return
        lines = (MetricsLine.model_validate_json(line) for line in raw)
        yield from (line for line in lines if line.phase == "train")


def _manifests(folder: Path) -> list[Manifest]:
    """Of everything whole in `folder`, the point that it started from included."""
    handed_over = [folder / RESUME] if (folder / RESUME / MANIFEST).exists() else []
    own = [path for kind in (CHECKPOINTS, RESUME_POINTS) for path in published(folder, kind)]
    return [read_manifest(path) for path in [*handed_over, *own]]


def _machine(manifests: list[Manifest]) -> dict[str, str | int | float]:
    """The plain facts of the newest manifest: torch version, device, threads."""
    if not manifests:
        return {}
    newest = max(manifests, key=lambda manifest: manifest.step)
    return {name: value for name, value in newest.facts.items() if name != STATE_HASH and isinstance(value, str | int | float)}


def _job_metrics(job_id: str, step: int) -> Metrics:
    with connect() as client:
        points = client.jobs.every_metric(job_id)
        return {point["name"]: point["value"] for point in points if (point["phase"], point["step"]) == ("train", step)}
