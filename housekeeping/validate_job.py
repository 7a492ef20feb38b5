"""The files of a job, read before it may queue: every row parses, fits the grader's templates, and there are enough of them.

What only the trainer can know (prompts that are too long) is checked there before step 0. Repeating a validation changes nothing.
"""

import logging
import math
import random
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core.errors import InvalidRequest, PlatformError
from core.grader_specs import PinnedGraderSpec
from core.lifecycle import Status
from core.options import Options
from core.rows import parse_row
from database.base_models import get_pinned_model
from database.blobs import BlobInfo
from database.jobs import fail_job, jobs_to_validate, mark_validated
from database.models import Checkpoint, Event, Job
from database.progress import add_event
from graders.template import check_templates
from housekeeping.context import Housekeeping
from housekeeping.rows import iter_lines

logger = logging.getLogger("hone.housekeeping")
GRADER = "method.reinforcement.grader"
MAX_HELD_OUT = 100
MAX_TRIES = 5
_NAMES = {"training_file": "Training file", "validation_file": "Validation file"}
_PINNED: TypeAdapter[Any] = TypeAdapter(PinnedGraderSpec)


def validate_waiting_jobs(housekeeping: Housekeeping) -> int:
    """Validates one job after the other until none waits; how many. Returns at once where another thread does it: that one looks again."""
    seen: set[str] = set()
    while _next_waiting(housekeeping, seen) is not None and housekeeping.validating.acquire(blocking=False):
        try:
            job = _next_waiting(housekeeping, seen)
            if job is not None:
                seen.add(job.id)
                _validate_or_count(housekeeping, job)
        finally:
            housekeeping.validating.release()
    return len(seen)


def validate_job(housekeeping: Housekeeping, job: Job) -> None:
    """Queues the job or fails it. Raises: StorageError (retryable) when its files cannot be read for now; the job stays as it is."""
    _announce(housekeeping, job)
    try:
        is_queued = _validate(housekeeping, job)
    except PlatformError as error:
        if error.retryable:
            raise
        _fail(housekeeping, job, error)
    else:
        if is_queued:
            housekeeping.doorbell.wake_worker()


def _next_waiting(housekeeping: Housekeeping, seen: set[str]) -> Job | None:
    with housekeeping.database.reading() as session:
        waiting = jobs_to_validate(session, len(seen) + 1)
    return next((job for job in waiting if job.id not in seen), None)


def _validate_or_count(housekeeping: Housekeeping, job: Job) -> None:
    """A job whose validation breaks holds up no other: it is tried again at the next ring, and failed in the end.

    Raises: SQLAlchemyError when the database is away, which is not the job's fault.
    """
    try:
        validate_job(housekeeping, job)
    except SQLAlchemyError:
        raise
    except Exception as cause:
        logger.exception("%s: the validation broke", job.id)
        tries = housekeeping.tries[job.id] = housekeeping.tries.get(job.id, 0) + 1
        if tries >= MAX_TRIES:
            _fail(housekeeping, job, cause if isinstance(cause, PlatformError) else PlatformError("The files could not be validated."))


def _announce(housekeeping: Housekeeping, job: Job) -> None:
    """Once per job, however often it is validated."""
    message = f"Validating training file: {job.training_file}"
    if job.validation_file is not None:
        message += f" and validation file: {job.validation_file}"
    with housekeeping.database.transaction() as session:
        query = select(Event.id).where(Event.job_id == job.id, Event.message == message).limit(1)
        if session.execute(query).first() is None:
            add_event(session, job.id, level="info", message=message)


def _validate(housekeeping: Housekeeping, job: Job) -> bool:
    """Whether the job is queued now (and was not cancelled meanwhile). Raises: InvalidRequest, StorageError."""
    _check_model(housekeeping, job)
    num_rows = _check_file(housekeeping, job, "training_file", job.training_blob)
    _check_number(housekeeping, num_rows)
    if job.validation_blob is not None:
        num_validation = _check_file(housekeeping, job, "validation_file", job.validation_blob)
        if num_validation == 0:
            raise _too_few("validation_file", 0, 1)
        with housekeeping.database.transaction() as session:
            return _queue(session, job, num_rows, num_validation)
    held_out = held_out_rows(num_rows, job.seed)
    training, validation = _split_blob(housekeeping, job, held_out)
    with housekeeping.database.transaction() as session:
        is_queued = _queue(session, job, num_rows - len(held_out), len(held_out), training, validation)
        if is_queued:
            message = f"No validation file: {len(held_out)} of {num_rows} training rows are held out for validation"
            add_event(session, job.id, level="warn", message=message, data={"held_out_rows": len(held_out)})
    return is_queued


def held_out_rows(num_rows: int, seed: int) -> frozenset[int]:
    """Which rows (from 0) are held out: a tenth, at least one and at most 100; the same for the same seed."""
    count = min(MAX_HELD_OUT, max(1, num_rows // 10))
    return frozenset(random.Random(seed).sample(range(num_rows), count))


def _check_model(housekeeping: Housekeeping, job: Job) -> None:
    """Raises: InvalidRequest for a fine-tuned model that is only an adapter; NotFound."""
    with housekeeping.database.reading() as session:
        model = get_pinned_model(session, job.project_id, job.model, job.model_digest)
        checkpoint = session.get(Checkpoint, model.checkpoint_id) if model.checkpoint_id is not None else None
    if checkpoint is not None and checkpoint.manifest["facts"].get("format") == "lora":
        message = f"'{job.model}' is a LoRA adapter; a job can start from a base model or from full weights."
        raise InvalidRequest(message, code="model_not_trainable", param="model")


def _check_file(housekeeping: Housekeeping, job: Job, param: str, blob: str) -> int:
    """The number of rows. Raises: InvalidRequest naming the line of the first that is wrong."""
    grader = _PINNED.validate_python(job.grader)
    limit = housekeeping.settings.max_training_rows
    count = 0
    for number, line in iter_lines(housekeeping.blobs.read(blob), param):
        row = parse_row(line, number, param)
        check_templates(grader, row.item, number, GRADER)
        count += 1
        if count > limit:
            raise InvalidRequest(f"{_NAMES[param]} has more than {limit} examples.", code="invalid_n_examples", param=param)
        if count % 1000 == 0:
            _stop_if_unwanted(housekeeping, job.id)
    return count


def _check_number(housekeeping: Housekeeping, num_rows: int) -> None:
    wanted = housekeeping.settings.min_training_rows
    if num_rows < wanted:
        raise _too_few("training_file", num_rows, wanted)


def _too_few(param: str, count: int, wanted: int) -> InvalidRequest:
    examples = "example" if wanted == 1 else "examples"
    message = f"{_NAMES[param]} has {count} example(s), but must have at least {wanted} {examples}"
    return InvalidRequest(message, code="invalid_n_examples", param=param)


def _stop_if_unwanted(housekeeping: Housekeeping, job_id: str) -> None:
    """Raises: InvalidRequest, which then fails nothing, for a job that was cancelled."""
    with housekeeping.database.reading() as session:
        status = session.execute(select(Job.status).where(Job.id == job_id)).scalar_one_or_none()
    if status != Status.VALIDATING_FILES:
        raise InvalidRequest(f"{job_id} is no longer being validated.")


def _split_blob(housekeeping: Housekeeping, job: Job, held_out: frozenset[int]) -> tuple[BlobInfo, BlobInfo]:
    """(training rows, held-out rows), line by line as they were uploaded."""
    return (
        housekeeping.blobs.put(_some_rows(housekeeping, job, held_out, wanted=False), kind="training_split"),
        housekeeping.blobs.put(_some_rows(housekeeping, job, held_out, wanted=True), kind="validation_split"),
    )


def _some_rows(housekeeping: Housekeeping, job: Job, held_out: frozenset[int], *, wanted: bool) -> Iterator[bytes]:
    lines = iter_lines(housekeeping.blobs.read(job.training_blob), "training_file")
    for index, (_, line) in enumerate(lines):
        if (index in held_out) == wanted:
            yield line + b"\n"


def _queue(
    session: Session, job: Job, num_rows: int, num_validation: int, training: BlobInfo | None = None, validation: BlobInfo | None = None
) -> bool:
    return mark_validated(
        session,
        job.id,
        num_training_rows=num_rows,
        num_validation_rows=num_validation,
        training_blob=None if training is None else training.id,
        validation_blob=None if validation is None else validation.id,
        total_steps=total_steps(Options.model_validate(job.options), num_rows),
    )


def total_steps(options: Options, num_rows: int) -> int:
    """As the trainer counts them; its own count replaces this one with its first line of metrics."""
    return options.max_steps or math.ceil(options.n_epochs * num_rows / min(options.batch_size, num_rows))


def _fail(housekeeping: Housekeeping, job: Job, error: PlatformError) -> None:
    with housekeeping.database.transaction() as session:
        fail_job(session, job.id, error)
    housekeeping.tries.pop(job.id, None)
