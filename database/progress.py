"""What a running job reports: events, metrics, samples. Lines become rows once, in the caller's transaction, under the token.

The functions that list take a job id that came from `jobs.get_job`, which checks the project.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import Select, and_, func, select, tuple_
from sqlalchemy.orm import Session

from core.errors import InvalidRequest
from core.run_directory import EventLine, MetricsLine, SampleLine
from database.guards import guard, take_numbers
from database.models import Attempt, Event, Job, Metric, RelayOffset, Sample, StepDigest
from database.pages import Page
from database.sql import clock, fetch_page, insert_row, new_id, now, upsert_rows

MAX_METRICS = 10_000
SAMPLE_PREFIX = "ftsample-"
"""Before the sample's number in its job."""

SampleOrder = Literal["seq", "reward", "-reward"]
GradeStatus = Literal["graded", "abstained", "failed"]


def add_event(
    session: Session,
    job_id: str,
    *,
    level: Literal["info", "warn", "error"],
    message: str,
    type: Literal["message", "metrics"] = "message",
    data: dict[str, Any] | None = None,
    attempt: int = 0,
    line: int | None = None,
    created_at: float | None = None,
) -> Event:
    return insert_row(
        session,
        Event,
        id=new_id("ftevent-"),
        job_id=job_id,
        seq=take_numbers(session, job_id, 1),
        attempt=attempt,
        line=line,
        created_at=clock() if created_at is None else created_at,
        level=level,
        type=type,
        message=message,
        data=data or {},
    )


def relay_offset(session: Session, job_id: str, attempt: int, file: str) -> int:
    """Bytes of the attempt's `file` that are stored."""
    stored = session.get(RelayOffset, (job_id, attempt, file))
    return 0 if stored is None else stored.offset


def store_events(session: Session, job_id: str, token: str, attempt: int, *, file: str, offset: int, lines: Sequence[EventLine]) -> None:
    """Stores `lines`, which end at byte `offset` of `file`; a repeated call changes nothing. Raises: LeaseLost."""
    first = _first_new_line(session, job_id, token, attempt, file, offset, len(lines))
    if first is None:
        return
    for number, line in enumerate(lines, first):
        add_event(session, job_id, attempt=attempt, line=number, **line.model_dump())


def store_metrics(session: Session, job_id: str, token: str, attempt: int, *, file: str, offset: int, lines: Sequence[MetricsLine]) -> None:
    """As `store_events`. A step that an earlier attempt reported is overwritten, with a `warn` event where its digest differs."""
    if _first_new_line(session, job_id, token, attempt, file, offset, len(lines)) is None:
        return
    _compare_digests(session, job_id, attempt, lines)
    values = {(line.step, line.phase, name): value for line in lines for name, value in line.values.items()}
    seq = take_numbers(session, job_id, len(values))
    rows = [
        {"job_id": job_id, "step": step, "phase": phase, "name": name, "value": _finite(value), "attempt": attempt, "seq": seq + index}
        for index, ((step, phase, name), value) in enumerate(values.items())
    ]
    upsert_rows(session, Metric, rows)
    guard(session, job_id, token, **_progress(session, job_id, attempt, lines))


def store_samples(session: Session, job_id: str, token: str, attempt: int, *, file: str, offset: int, lines: Sequence[SampleLine]) -> None:
    """As `store_events`; a sample that an earlier attempt reported is overwritten."""
    if _first_new_line(session, job_id, token, attempt, file, offset, len(lines)) is None:
        return
    samples = {(line.step, line.phase, line.prompt_index, line.g): line for line in lines}
    seq = take_numbers(session, job_id, len(samples))
    upsert_rows(
        session, Sample, [{"job_id": job_id, "seq": seq + index, **line.model_dump()} for index, line in enumerate(samples.values())]
    )


def list_events(session: Session, job_id: str, *, after: str | None, limit: int) -> Page[Event]:
    """Newest first. Raises: InvalidRequest for an unknown `after`."""
    query = select(Event).where(Event.job_id == job_id)
    return fetch_page(session, query, (Event.seq,), after=after, limit=limit, id_column=Event.id)


def list_digests(session: Session, job_id: str, *, after: int | None, limit: int) -> Page[StepDigest]:
    """The chain of the steps that are done, first step first; `after` is the step of the last one seen.

    What an earlier attempt did beyond the step where the job stands now is another chain's, so it is left out.
    Raises: InvalidRequest for an unknown `after`.
    """
    query = select(StepDigest).join(Job, Job.id == StepDigest.job_id)
    query = query.where(StepDigest.job_id == job_id, StepDigest.phase == "train", StepDigest.step <= Job.current_step)
    return fetch_page(session, query, (StepDigest.step,), after=after, limit=limit, id_column=StepDigest.step, descending=False)


def list_metrics(
    session: Session,
    job_id: str,
    *,
    after: int = 0,
    names: Sequence[str] | None = None,
    max_points: int | None = None,
    limit: int = MAX_METRICS,
) -> Page[Metric]:
    """Metrics numbered above `after`, in the order of `seq`: poll with the last one's `seq`.

    `max_points` thins every curve (phase, name) to at most that many points, evenly and always with the newest.
    """
    query = select(Metric).where(Metric.job_id == job_id, Metric.seq > after)
    if names is not None:
        query = query.where(Metric.name.in_(names))
    if max_points is not None:
        query = _thinned(query, max_points)
    rows = list(session.execute(query.order_by(Metric.seq).limit(limit + 1)).scalars())
    return Page(rows[:limit], len(rows) > limit)


def list_samples(
    session: Session,
    job_id: str,
    *,
    step: int | None = None,
    phase: Literal["train", "valid"] | None = None,
    status: GradeStatus | None = None,
    error: str | None = None,
    grader_version: str | None = None,
    order: SampleOrder = "seq",
    min_reward: float | None = None,
    max_reward: float | None = None,
    after: int | None = None,
    limit: int = 20,
) -> Page[Sample]:
    """Samples as they came, or by reward (those without a grade last). `after` is the `seq` of the last one seen.

    `status` is what became of the grade, `error` the code of a failed one.

    Raises: InvalidRequest for an unknown `after`.
    """
    query = select(Sample).where(Sample.job_id == job_id)
    for column, value in ((Sample.step, step), (Sample.phase, phase), (Sample.error, error), (Sample.grader_version, grader_version)):
        if value is not None:
            query = query.where(column == value)
    if status is not None:
        query = query.where(_has_status(status))
    if min_reward is not None:
        query = query.where(Sample.reward >= min_reward)
    if max_reward is not None:
        query = query.where(Sample.reward <= max_reward)
    if after is not None:
        query = query.where(_behind_sample(session, query, order, after))
    if order != "seq":
        query = query.order_by(Sample.reward.is_(None), Sample.reward.desc() if order == "-reward" else Sample.reward)
    rows = list(session.execute(query.order_by(Sample.seq).limit(limit + 1)).scalars())
    return Page(rows[:limit], len(rows) > limit)


def spread_samples(
    session: Session, job_id: str, *, step: int | None, phase: Literal["train", "valid"] | None, limit: int
) -> tuple[list[Sample], int]:
    """At most `limit` graded samples, evenly spread over the job, and the number of those that it has."""
    query = select(Sample).where(Sample.job_id == job_id, Sample.reward.is_not(None))
    if step is not None:
        query = query.where(Sample.step == step)
    if phase is not None:
        query = query.where(Sample.phase == phase)
    order = (Sample.step, Sample.phase, Sample.prompt_index, Sample.g)
    rank = func.row_number().over(order_by=order).label("rank")
    ranked = query.with_only_columns(Sample.seq, rank, func.count().over().label("count")).subquery()
    total = session.execute(select(func.max(ranked.c.count))).scalar_one() or 0
    stride = max(1, -(-total // limit))
    kept = select(ranked.c.seq).where((ranked.c.rank - 1) % stride == 0)
    rows = session.execute(query.where(Sample.seq.in_(kept)).order_by(*order)).scalars()
    return list(rows), total


def _has_status(status: GradeStatus) -> Any:
    if status == "graded":
        return Sample.reward.is_not(None)
    return and_(Sample.reward.is_(None), Sample.error.is_(None) if status == "abstained" else Sample.error.is_not(None))


def _behind_sample(session: Session, query: Select[Sample], order: SampleOrder, after: int) -> Any:
    start = session.execute(query.where(Sample.seq == after)).scalar_one_or_none()
    if start is None:
        raise InvalidRequest(f"There is no sample {after} in this list to go on after.", param="after")
    later = Sample.seq > after
    if order == "seq":
        return later
    if start.reward is None:
        return and_(Sample.reward.is_(None), later)
    beyond = Sample.reward < start.reward if order == "-reward" else Sample.reward > start.reward
    return beyond | Sample.reward.is_(None) | and_(Sample.reward == start.reward, later)


def _thinned(query: Select[Metric], max_points: int) -> Select[Metric]:
    """Every k-th point of each curve counted back from the newest, k the smallest with at most `max_points` left."""
    curve = (Metric.phase, Metric.name)
    rank = func.row_number().over(partition_by=curve, order_by=Metric.step.desc()).label("rank")
    count = func.count().over(partition_by=curve).label("count")
    ranked = query.with_only_columns(Metric.step, Metric.phase, Metric.name, rank, count).subquery()
    stride = (ranked.c.count + max_points - 1) // max_points
    kept = select(ranked.c.step, ranked.c.phase, ranked.c.name).where((ranked.c.rank - 1) % stride == 0)
    return query.where(tuple_(Metric.step, Metric.phase, Metric.name).in_(kept))


def _first_new_line(session: Session, job_id: str, token: str, attempt: int, file: str, offset: int, count: int) -> int | None:
    """The number of the first of `count` lines that end at `offset`, noted as stored; None when they were stored before."""
    guard(session, job_id, token)
    stored = session.get(RelayOffset, (job_id, attempt, file), populate_existing=True)
    if stored is not None and stored.offset >= offset:
        return None
    first = 0 if stored is None else stored.lines
    row = {"job_id": job_id, "attempt": attempt, "file": file, "offset": offset, "lines": first + count}
    upsert_rows(session, RelayOffset, [row])
    return first


def _compare_digests(session: Session, job_id: str, attempt: int, lines: Sequence[MetricsLine]) -> None:
    new = {(line.step, line.phase): line.digest for line in lines if line.digest}
    steps = [step for step, _ in new]
    query = select(StepDigest).where(StepDigest.job_id == job_id, StepDigest.step.in_(steps))
    old = {(row.step, row.phase): row.digest for row in session.execute(query).scalars()}
    differing = sorted(key for key, digest in new.items() if old.get(key, digest) != digest)
    if differing:
        step, phase = differing[0]
        message = f"Attempt {attempt} computed step {step} ({phase}) otherwise than the attempt before it."
        add_event(session, job_id, level="warn", message=message, data={"code": "resume_diverged", "step": step, "phase": phase})
    rows = [{"job_id": job_id, "step": step, "phase": phase, "digest": digest} for (step, phase), digest in new.items()]
    upsert_rows(session, StepDigest, rows)


def _progress(session: Session, job_id: str, attempt: int, lines: Sequence[MetricsLine]) -> dict[str, Any]:
    """What `lines` say about how far the job is."""
    changes: dict[str, Any] = {}
    steps = [line.step for line in lines if line.phase == "train"]
    totals = [line.total_steps for line in lines if line.total_steps > 0]
    if totals:
        changes["total_steps"] = totals[-1]
    if steps:
        total = totals[-1] if totals else session.execute(select(Job.total_steps).where(Job.id == job_id)).scalar_one()
        changes |= {"current_step": max(steps), "probes": 0, "probe_at": None}
        changes["estimated_finish"] = _estimated_finish(session, session.get(Attempt, (job_id, attempt)), max(steps), total)
    return changes


def _estimated_finish(session: Session, attempt: Attempt | None, step: int, total: int | None) -> float | None:
    """Now, plus what is left at the attempt's mean pace."""
    if attempt is None or total is None or step <= (attempt.from_step or 0):
        return None
    current = now(session)
    return current + (total - step) * (current - attempt.started_at) / (step - (attempt.from_step or 0))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
