"""What the files of a job are checked for, and what the user is told."""

import json
from typing import Any

import pytest
from sqlalchemy import select

from core.doorbell import Doorbell
from core.errors import StorageError
from core.grader_specs import StringCheckGrader
from core.lifecycle import Status
from core.options import Options
from core.run_directory import Manifest
from core.settings import Settings
from database.base_models import register_model
from database.blobs import BlobStore
from database.checkpoints import final_model, publish_checkpoint
from database.jobs import cancel_job, get_job, insert_job
from database.models import Event, Job
from database.projects import create_project
from database.session import Database
from housekeeping.context import Housekeeping
from housekeeping.rows import MAX_LINE_BYTES, iter_lines
from housekeeping.validate_job import MAX_TRIES, held_out_rows, validate_waiting_jobs
from tests.database.rows import make_running, new_job

only_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


class SilentBell(Doorbell):
    def __init__(self) -> None:
        self.rung: list[str] = []

    def wake_worker(self) -> bool:
        self.rung.append("worker")
        return True

    def wake_validation(self) -> bool:
        self.rung.append("validation")
        return True

    def wake_probe(self) -> bool:
        self.rung.append("probe")
        return True

    def wake_reports(self) -> bool:
        self.rung.append("reports")
        return True


@pytest.fixture
def housekeeping(settings: Settings, database: Database) -> Housekeeping:
    return Housekeeping(settings, database, BlobStore(database, settings), SilentBell())


def row(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"question {number}"}], "answer": str(number), **more}


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in rows)


def submit(housekeeping: Housekeeping, training: bytes, validation: bytes | None = None, **changes: Any) -> tuple[str, str]:
    """(project id, job id) of a job that waits for its validation."""
    stored = housekeeping.blobs.put([training], kind="file").id
    other = None if validation is None else housekeeping.blobs.put([validation], kind="file").id
    with housekeeping.database.transaction() as session:
        project = create_project(session, "team").id
        name = f"tiny-{project}"
        register_model(session, name=name, project_id=project, kind="base", source={"type": "folder", "path": "/m"}, digest="d" * 64)
        values = {"model": name, "training_blob": stored, "validation_blob": other, "validation_file": "file-b" if other else None}
        job = insert_job(session, new_job(project, **{**values, **changes}))
    return project, job.id


def validated(housekeeping: Housekeeping, training: bytes, validation: bytes | None = None, **changes: Any) -> Job:
    project, job_id = submit(housekeeping, training, validation, **changes)
    validate_waiting_jobs(housekeeping)
    with housekeeping.database.reading() as session:
        return get_job(session, project, job_id)


def messages(housekeeping: Housekeeping, job_id: str) -> list[tuple[str, str]]:
    """(level, message), oldest first, without the first: that the job was created."""
    with housekeeping.database.reading() as session:
        query = select(Event.level, Event.message).where(Event.job_id == job_id).order_by(Event.seq)
        return [(level, message) for level, message in session.execute(query)][1:]


def read_rows(housekeeping: Housekeeping, blob: str) -> list[str]:
    return [json.loads(line)["answer"] for line in b"".join(housekeeping.blobs.read(blob)).splitlines()]


def test_good_files_queue_the_job_and_ring_a_worker(housekeeping: Housekeeping) -> None:
    training = as_lines([row(number) for number in range(20)])
    job = validated(housekeeping, training, as_lines([row()]), options=Options(n_epochs=2, batch_size=8))
    assert (job.status, job.num_training_rows, job.num_validation_rows, job.total_steps) == (Status.QUEUED, 20, 1, 5)
    assert b"".join(housekeeping.blobs.read(job.training_blob)) == training
    assert messages(housekeeping, job.id) == [
        ("info", "Validating training file: file-a and validation file: file-b"),
        ("info", "Files validated, moving job to queued state"),
    ]
    assert housekeeping.doorbell.rung == ["worker"]


def test_without_a_validation_file_a_tenth_is_held_out_and_nothing_is_lost(housekeeping: Housekeeping) -> None:
    lines = as_lines([row(number) for number in range(40)]).replace(b"\n", b"\n\n", 3)
    job = validated(housekeeping, lines, seed=3)
    training, held_out = read_rows(housekeeping, job.training_blob), read_rows(housekeeping, job.validation_blob)
    assert (job.status, job.num_training_rows, job.num_validation_rows) == (Status.QUEUED, 36, 4)
    assert (len(training), len(held_out)) == (36, 4)
    assert sorted(training + held_out, key=int) == [str(number) for number in range(40)]
    assert messages(housekeeping, job.id)[-1] == ("warn", "No validation file: 4 of 40 training rows are held out for validation")
    again = validated(housekeeping, lines, seed=3)
    assert read_rows(housekeeping, again.validation_blob) == held_out


def test_hold_out_is_a_tenth_but_at_least_one_row_and_at_most_a_hundred() -> None:
    assert [len(held_out_rows(number, 1)) for number in (1, 9, 10, 25, 1000, 50_000)] == [1, 1, 1, 2, 100, 100]
    assert held_out_rows(200, 1) != held_out_rows(200, 2)
    assert all(0 <= index < 200 for index in held_out_rows(200, 1))


BAD_TRAINING = [
    ([row()] * 7, "invalid_n_examples", "training_file", "Training file has 7 example(s), but must have at least 10 examples"),
    ([], "invalid_n_examples", "training_file", "Training file has 0 example(s)"),
    ([row()] * 31, "invalid_n_examples", "training_file", "Training file has more than 30 examples"),
    ([row()] * 11 + [[1]], "invalid_training_file", "training_file", "Line 12 must be a JSON object, not list"),
    ([row()] * 11 + [{"answer": "1"}], "invalid_training_file", "training_file", "Line 12, 'messages'"),
    (
        [row()] * 11 + [row(messages=[{"role": "user", "content": "  "}])],
        "invalid_training_file",
        "training_file",
        "Line 12: the prompt is empty",
    ),
    (
        [row()] * 11 + [{"messages": row()["messages"]}],
        "invalid_variable_error",
        "method.reinforcement.grader.reference",
        "Line 12: 'item.answer' is missing",
    ),
]


@pytest.mark.parametrize(("rows", "code", "param", "words"), BAD_TRAINING)
@only_sqlite
def test_bad_training_file_fails_the_job_with_code_field_and_line(
    housekeeping: Housekeeping, rows: list[Any], code: str, param: str, words: str
) -> None:
    object.__setattr__(housekeeping, "settings", housekeeping.settings.model_copy(update={"max_training_rows": 30}))
    job = validated(housekeeping, as_lines(rows))
    assert (job.status, job.error_code, job.error_param) == (Status.FAILED, code, param)
    assert words in job.error_message
    assert job.finished_at is not None
    assert messages(housekeeping, job.id)[-1] == ("error", job.error_message)
    assert housekeeping.doorbell.rung == []


@only_sqlite
def test_bad_validation_file_is_named_as_such(housekeeping: Housekeeping) -> None:
    good = as_lines([row()] * 12)
    broken = validated(housekeeping, good, b"\xff\xfe\n")
    assert (broken.status, broken.error_code, broken.error_param) == (Status.FAILED, "invalid_validation_file", "validation_file")
    empty = validated(housekeeping, good, b"\n")
    assert (empty.error_code, empty.error_param) == ("invalid_n_examples", "validation_file")
    assert empty.error_message == "Validation file has 0 example(s), but must have at least 1 example"


@only_sqlite
def test_grader_without_templates_asks_for_no_column(housekeeping: Housekeeping) -> None:
    grader = StringCheckGrader(type="string_check", input="{{sample.output_text}}", reference="yes", operation="eq")
    assert validated(housekeeping, as_lines([{"messages": row()["messages"]}] * 12), grader=grader).status == Status.QUEUED


@only_sqlite
@pytest.mark.parametrize("weights_format", ["full", "lora"])
def test_job_on_a_fine_tuned_model_needs_its_full_weights(housekeeping: Housekeeping, weights_format: str) -> None:
    project, claimed = make_running(housekeeping.database)
    made = Manifest(kind="checkpoint", step=2, files=[], facts={"format": weights_format})
    with housekeeping.database.transaction() as session:
        checkpoint = publish_checkpoint(session, claimed.job.id, claimed.token, step=2, manifest=made, files=[], keep=1)
        model = final_model(session, claimed.job.id, claimed.token, checkpoint)
        blob = housekeeping.blobs.put([as_lines([row()] * 12)], kind="file").id
        values = {"model": model.name, "model_digest": model.digest, "training_blob": blob}
        job_id = insert_job(session, new_job(project, **values)).id
    validate_waiting_jobs(housekeeping)
    with housekeeping.database.reading() as session:
        job = get_job(session, project, job_id)
    wanted = (Status.QUEUED, None, None) if weights_format == "full" else (Status.FAILED, "model_not_trainable", "model")
    assert (job.status, job.error_code, job.error_param) == wanted


@only_sqlite
def test_job_cancelled_meanwhile_stays_cancelled(housekeeping: Housekeeping, monkeypatch: pytest.MonkeyPatch) -> None:
    project, job_id = submit(housekeeping, as_lines([row()] * 12))
    read = housekeeping.blobs.read

    def cancel_then_read(blob: str) -> Any:
        with housekeeping.database.transaction() as session:
            if get_job(session, project, job_id).status == Status.VALIDATING_FILES:
                cancel_job(session, project, job_id)
        return read(blob)

    monkeypatch.setattr(housekeeping.blobs, "read", cancel_then_read)
    validate_waiting_jobs(housekeeping)
    with housekeeping.database.reading() as session:
        assert get_job(session, project, job_id).status == Status.CANCELLED
    assert housekeeping.doorbell.rung == []


@only_sqlite
def test_storage_that_is_away_is_tried_again_and_holds_up_no_other_job(housekeeping: Housekeeping, monkeypatch: pytest.MonkeyPatch) -> None:
    project, job_id = submit(housekeeping, as_lines([row()] * 12))
    other_project, other_id = submit(housekeeping, as_lines([row()] * 12))
    with housekeeping.database.reading() as session:
        away = get_job(session, project, job_id).training_blob
    read = housekeeping.blobs.read

    def fail_for_one(blob: str) -> Any:
        if blob == away:
            raise StorageError("the object store does not answer")
        return read(blob)

    monkeypatch.setattr(housekeeping.blobs, "read", fail_for_one)
    for tried in range(1, MAX_TRIES + 1):
        validate_waiting_jobs(housekeeping)
        with housekeeping.database.reading() as session:
            status = get_job(session, project, job_id).status
            assert get_job(session, other_project, other_id).status == Status.QUEUED
        assert status == (Status.FAILED if tried == MAX_TRIES else Status.VALIDATING_FILES)
    told = [message for _, message in messages(housekeeping, job_id)]
    assert told == ["Validating training file: file-a", "the object store does not answer"]


def test_lines_are_cut_as_python_cuts_them_whatever_the_pieces() -> None:
    content = b"one\n\n  \ntwo\r\n" + b"x" * 5000 + b"\nlast"
    wanted = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    for size in (1, 7, 4096, 10_000):
        pieces = [content[start : start + size] for start in range(0, len(content), size)]
        assert list(iter_lines(pieces, "training_file")) == wanted


def test_line_without_an_end_is_refused_before_it_fills_the_memory() -> None:
    taken = []

    def endless() -> Any:
        for _ in range(1000):
            taken.append(1)
            yield b"x" * 1024 * 1024

    with pytest.raises(Exception, match="Line 1 is longer"):
        list(iter_lines(endless(), "training_file"))
    assert len(taken) <= MAX_LINE_BYTES // (1024 * 1024) + 1
