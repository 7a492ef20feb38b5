import pytest

from core.errors import InvalidRequest, InvalidTransition, NotFound
from core.grader_specs import PinnedEndpointGrader
from core.lifecycle import Status
from core.options import Options
from database.jobs import (
    cancel_job,
    fail_job,
    get_job,
    insert_job,
    jobs_to_validate,
    list_jobs,
    mark_validated,
    pause_job,
    resume_job,
)
from database.progress import list_events
from tests.database.rows import make_project, make_queued, make_running, new_job, read_job, write_old_deadline

VALIDATED = {"num_training_rows": 9, "num_validation_rows": 1, "validation_blob": "blob_held_out", "total_steps": 5}


def messages(database, job_id):
    with database.reading() as session:
        return [event.message for event in list_events(session, job_id, after=None, limit=100).items]


def test_a_new_job_is_validating_and_has_its_first_event(database):
    options = Options(batch_size=4, stop=("\n",))
    grader = PinnedEndpointGrader(type="endpoint", url="https://g.example/", secret_ref="inline", grader_version="inline")
    with database.transaction() as session:
        project = make_project(session)
        job_id = insert_job(session, new_job(project, options=options, grader=grader, suffix="s", metadata={})).id
    with database.reading() as session:
        job = get_job(session, project, job_id)
    assert (job.status, job.attempt, job.seq, job.lease_token, job.job_metadata) == (Status.VALIDATING_FILES, 0, 1, None, None)
    assert Options.model_validate(job.options) == options
    assert PinnedEndpointGrader.model_validate(job.grader) == grader
    assert job_id.startswith("ftjob-")
    assert messages(database, job_id) == [f"Created fine-tuning job: {job_id}"]


def test_a_job_of_another_project_is_not_found_by_any_function(database):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        job_id = make_queued(session, mine)
        for function in (get_job, cancel_job, pause_job, resume_job):
            with pytest.raises(NotFound) as caught:
                function(session, other, job_id)
            assert (caught.value.code, caught.value.param) == ("fine_tune_not_found", "fine_tune_id")
        assert list_jobs(session, other, after=None, limit=5).items == []
        assert get_job(session, mine, job_id).status == Status.QUEUED


def test_jobs_are_listed_newest_first_and_by_metadata(database):
    hostile = {'a"b': "x'; --", "k\x00": "v\x00"}
    with database.transaction() as session:
        project = make_project(session)
        plain = insert_job(session, new_job(project)).id
        tagged = insert_job(session, new_job(project, metadata={"team": "blue", "run": "1"})).id
        other = insert_job(session, new_job(project, metadata={"team": "red", **hostile})).id

        def found(metadata):
            return [job.id for job in list_jobs(session, project, after=None, limit=9, metadata=metadata).items]

        assert found(None) == [other, tagged, plain]
        assert found("null") == [plain]
        assert found({"team": "blue"}) == [tagged]
        assert found({"team": "blue", "run": "2"}) == []
        assert found(hostile) == [other]
        assert found({"missing": "blue"}) == []
        page = list_jobs(session, project, after=other, limit=1)
        assert ([job.id for job in page.items], page.has_more) == ([tagged], True)
        with pytest.raises(InvalidRequest) as caught:
            list_jobs(session, project, after="ftjob-no", limit=1)
    assert caught.value.param == "after"


def test_validation_queues_a_job_once_and_pins_the_rows_held_out(database):
    with database.transaction() as session:
        project = make_project(session)
        first, second = (insert_job(session, new_job(project)).id for _ in range(2))
        assert [job.id for job in jobs_to_validate(session, 10)] == [first, second]
        assert mark_validated(session, first, **VALIDATED)
        assert not mark_validated(session, first, **VALIDATED)
        assert [job.id for job in jobs_to_validate(session, 10)] == [second]
    job = read_job(database, first)
    assert (job.status, job.validation_blob, job.training_blob, job.total_steps) == (Status.QUEUED, "blob_held_out", "blob_a", 5)


def test_bad_files_fail_the_job_with_code_and_param(database):
    error = InvalidRequest("Line 3 is not JSON.", code="invalid_training_file", param="training_file")
    with database.transaction() as session:
        project = make_project(session)
        job_id = insert_job(session, new_job(project)).id
        assert fail_job(session, job_id, error)
        assert not fail_job(session, job_id, error)
        assert not mark_validated(session, job_id, **VALIDATED)
    job = read_job(database, job_id)
    assert (job.status, job.error_code, job.error_param) == (Status.FAILED, "invalid_training_file", "training_file")
    assert job.finished_at is not None
    assert messages(database, job_id)[0] == "Line 3 is not JSON."


def test_a_cancelled_job_is_not_validated_any_more(database):
    with database.transaction() as session:
        project = make_project(session)
        job_id = insert_job(session, new_job(project)).id
        cancel_job(session, project, job_id)
        assert not mark_validated(session, job_id, **VALIDATED)
        assert not fail_job(session, job_id, InvalidRequest("late"))
    assert read_job(database, job_id).status == Status.CANCELLED


def test_cancel_without_a_holder_ends_the_job_at_once_and_with_one_at_its_release(database):
    with database.transaction() as session:
        project = make_project(session)
        waiting = cancel_job(session, project, make_queued(session, project))
    held_project, held = make_running(database)
    with database.transaction() as session:
        running = cancel_job(session, held_project, held.job.id)
    assert waiting.finished_at is not None
    assert (running.status, running.finished_at, running.lease_token) == (Status.CANCELLED, None, held.token)


def test_cancel_of_a_job_whose_holder_is_dead_ends_it_at_once(database):
    project, held = make_running(database)
    write_old_deadline(database, held.job.id)
    with database.transaction() as session:
        job = cancel_job(session, project, held.job.id)
    assert job.finished_at is not None
    assert (job.lease_token, job.lease_expires_at) == (None, None)


def test_changes_that_the_table_lacks_are_refused_by_code(database):
    project, held = make_running(database)
    with database.transaction() as session:
        with pytest.raises(InvalidTransition) as caught:
            resume_job(session, project, held.job.id)
        assert caught.value.code == "job_not_resumable"
        cancel_job(session, project, held.job.id)
        for function, code in ((cancel_job, "job_not_cancellable"), (pause_job, "job_not_pausable"), (resume_job, "job_not_resumable")):
            with pytest.raises(InvalidTransition) as caught:
                function(session, project, held.job.id)
            assert caught.value.code == code
