"""The samples of a job scored again by another grader, and how far the two agree. A grade that failed is counted, never filled in."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from core.errors import InvalidRequest, StorageError
from core.rows import parse_row
from database.graders import pin_grader, read_secrets
from database.jobs import get_job
from database.models import File, GraderReport, Job, Sample
from database.progress import SAMPLE_PREFIX, spread_samples
from database.secrets import load_secrets
from graders.build import build_grader
from graders.grade import Grade, Grader, GradeRequest, idempotency_key
from housekeeping.agreement import average_ranks, kendall, spearman
from housekeeping.context import Housekeeping
from housekeeping.rows import iter_lines
from housekeeping.validate_job import held_out_rows

DEADLINE_SECONDS = 900.0
MAX_DISAGREEMENTS = 20


class Regraded(NamedTuple):
    sample: Sample
    grade: Grade | None
    """None: the time was over before it was graded."""


@dataclass(frozen=True)
class Outcome:
    summary: str
    result: dict[str, Any]


def make_regrade(housekeeping: Housekeeping, report: GraderReport, *, deadline_seconds: float = DEADLINE_SECONDS) -> Outcome:
    """Raises: NotFound, InvalidRequest (no_samples), StorageError when the rows of the job are gone."""
    asked, started = report.request, time.monotonic()
    with housekeeping.database.reading() as session:
        job = get_job(session, report.project_id, asked["job_id"])
        samples, total = spread_samples(session, job.id, step=asked["step"], phase=asked["phase"], limit=asked["max_samples"])
        spec = pin_grader(session, report.project_id, report.grader_id, report.grader_version)
        secrets = {spec.secret_ref: read_secrets(session, load_secrets(housekeeping.settings), spec.secret_ref)}
    if not samples:
        raise InvalidRequest(f"{job.id} has no graded sample of that kind.", code="no_samples", param="job_id")
    requests = _requests(housekeeping, job, samples, spec.grader_version)

    async def run() -> list[Grade | None]:
        return await _grade_all(
            build_grader(spec, secrets, housekeeping.network, housekeeping.limits(report.project_id)), requests, deadline_seconds
        )

    pairs = [Regraded(sample, grade) for sample, grade in zip(samples, asyncio.run(run()), strict=True)]
    facts = {"job_id": job.id, "num_graded_samples": total, **compare(pairs), "seconds": time.monotonic() - started}
    return Outcome(_summary(facts), facts)


def compare(pairs: Sequence[Regraded]) -> dict[str, Any]:
    """Over the samples that both graders scored: rank correlations, means and the largest disagreements."""
    asked = [(sample, grade) for sample, grade in pairs if grade is not None]
    scored = [(sample, grade) for sample, grade in asked if grade.reward is not None]
    failures = [grade for _, grade in asked if grade.error is not None]
    old = [sample.reward for sample, _ in scored if sample.reward is not None]
    new = [grade.reward for _, grade in scored if grade.reward is not None]
    return {
        "old_grader_versions": sorted({sample.grader_version for sample, _ in pairs}),
        "num_asked": len(pairs),
        "num_compared": len(scored),
        "num_abstained": sum(grade.abstained for _, grade in asked),
        "num_failed": len(failures),
        "num_not_reached": len(pairs) - len(asked),
        "failures": dict(Counter(grade.error for grade in failures)),
        "first_failure": failures[0].error_message if failures else None,
        "spearman": spearman(old, new),
        "kendall": kendall(old, new),
        "old_mean": _mean(old),
        "new_mean": _mean(new),
        "disagreements": _disagreements(scored, old, new),
    }


def _disagreements(scored: Sequence[tuple[Sample, Grade]], old: Sequence[float], new: Sequence[float]) -> list[dict[str, Any]]:
    """The samples whose place in the order changed most; ranks, since two graders need not share a scale."""
    rows: list[dict[str, Any]] = [
        {
            "sample_id": f"{SAMPLE_PREFIX}{sample.seq}",
            "step": sample.step,
            "phase": sample.phase,
            "old_reward": before,
            "new_reward": after,
            "old_rank": old_rank,
            "new_rank": new_rank,
            "explanation": grade.explanation,
        }
        for (sample, grade), before, after, old_rank, new_rank in zip(scored, old, new, average_ranks(old), average_ranks(new), strict=True)
        if old_rank != new_rank or before != after
    ]
    rows.sort(key=lambda row: (abs(row["old_rank"] - row["new_rank"]), abs(row["old_reward"] - row["new_reward"])), reverse=True)
    return rows[:MAX_DISAGREEMENTS]


def _requests(housekeeping: Housekeeping, job: Job, samples: Sequence[Sample], grader_version: str) -> list[GradeRequest]:
    items = {phase: _items(housekeeping, job, phase, samples) for phase in {sample.phase for sample in samples}}
    return [_request(job, sample, items[sample.phase][sample.prompt_index], grader_version) for sample in samples]


def _request(job: Job, sample: Sample, item: dict[str, Any], grader_version: str) -> GradeRequest:
    """As the trainer asked, but under a key of its own: the same in every try of the report."""
    key = idempotency_key(
        job_id=job.id,
        phase=f"regrade_{sample.phase}",
        step=sample.step,
        prompt_index=sample.prompt_index,
        g=sample.g,
        grader_version=grader_version,
        completion=sample.completion,
    )
    return GradeRequest(
        item=item,
        output_text=sample.completion,
        output_json=None if job.response_format is None else _parsed(sample.completion),
        finish_reason=sample.finish_reason,
        trace_id=hashlib.sha256(f"{key}/trace".encode()).hexdigest()[:32],
        idempotency_key=key,
        metadata={"job_id": job.id, "step": sample.step, "attempt": job.attempt},
    )


def _items(housekeeping: Housekeeping, job: Job, phase: str, samples: Sequence[Sample]) -> dict[int, dict[str, Any]]:
    """{row number: the row} of those rows of a phase that `samples` answer. Raises: StorageError."""
    wanted = {sample.prompt_index for sample in samples if sample.phase == phase}
    is_split = job.validation_file is None
    param = "training_file" if phase == "train" or is_split else "validation_file"
    held_out = held_out_rows((job.num_training_rows or 0) + (job.num_validation_rows or 0), job.seed) if is_split else frozenset()
    with housekeeping.database.reading() as session:
        file = session.get(File, getattr(job, param))
    assert file is not None, "files are hidden, never removed"
    items: dict[int, dict[str, Any]] = {}
    index = -1
    for place, (number, line) in enumerate(iter_lines(housekeeping.blobs.read(file.blob), param)):
        if is_split and (place in held_out) != (phase == "valid"):
            continue
        index += 1
        if index in wanted:
            items[index] = parse_row(line, number, param).item
    if wanted - items.keys():
        raise StorageError(f"Row {min(wanted - items.keys())} of {param} is not there.", retryable=False)
    return items


async def _grade_all(grader: Grader, requests: Sequence[GradeRequest], deadline_seconds: float) -> list[Grade | None]:
    """The grades in the order of `requests`; None for what was not graded by the deadline."""
    tasks = [asyncio.create_task(grader.grade(request)) for request in requests]
    try:
        _, late = await asyncio.wait(tasks, timeout=deadline_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return [None if task in late else task.result() for task in tasks]
    finally:
        await grader.close()


def _parsed(text: str) -> Any | None:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _summary(facts: dict[str, Any]) -> str:
    over = f"over {facts['num_compared']} of {facts['num_asked']} samples"
    if facts["spearman"] is None:
        return f"No rank correlation {over}: there are not two different scores on both sides."
    counts = [(facts["num_failed"], "failed"), (facts["num_abstained"], "abstained"), (facts["num_not_reached"], "not reached in time")]
    rest = "".join(f", {count} {what}" for count, what in counts if count)
    return f"Spearman {facts['spearman']:.3f}, Kendall {facts['kendall']:.3f} {over}{rest}."
