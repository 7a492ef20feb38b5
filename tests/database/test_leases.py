import pytest
from sqlalchemy import select, update

from core.errors import Diverged, GraderUnavailable, LeaseLost, TrainerCrashed
from core.lifecycle import PauseReason, Status
from database.jobs import cancel_job, list_attempts, pause_job, resume_job
from database.leases import claim_job, count_queued, expire_leases, guard, release, renew_lease
from database.models import Job
from database.progress import list_events
from database.sql import now
from tests.database.rows import claim, in_threads, make_project, make_queued, make_running, read_job, write_old_deadline

CRASH = TrainerCrashed("exit code 139")


def end(database, held, **options):
    with database.transaction() as session:
        return release(session, held.job.id, held.token, **({"max_attempts": 3, "reason": "ended"} | options))


def claim_again(database):
    with database.transaction() as session:
        return claim(session, worker="w2")


def test_a_claim_holds_the_job_until_a_time_of_the_databases_clock(database):
    _, held = make_running(database)
    with database.transaction() as session:
        assert claim(session) is None
        left = held.job.lease_expires_at - now(session)
        attempt = list_attempts(session, held.job.id)[0]
    assert 55 < left <= 60
    assert (held.job.status, held.attempt, held.job.worker) == (Status.RUNNING, 1, "w1")
    assert (attempt.worker, attempt.host, attempt.device, attempt.ended_at) == ("w1", "h", "cpu", None)


def test_threads_that_claim_at_once_never_get_the_same_job(database):
    with database.transaction() as session:
        projects = [make_project(session) for _ in range(2)]
        made = {make_queued(session, projects[number % 2]) for number in range(12)}

    def claim_until_empty():
        mine = []
        while (held := claim_again(database)) is not None:
            mine.append(held.job.id)
        return mine

    claimed = [job_id for mine in in_threads([claim_until_empty] * 3) for job_id in mine]
    assert sorted(claimed) == sorted(made)


@pytest.mark.parametrize("settings", ["postgresql"], indirect=True)
def test_on_postgresql_a_claim_passes_over_a_job_that_another_is_just_claiming(database):
    with database.transaction() as session:
        project = make_project(session)
        made = [make_queued(session, project) for _ in range(2)]
    with database.transaction() as first, database.transaction() as second:
        assert [claim(first).job.id, claim(second).job.id] == made
        with database.transaction() as third:
            assert claim(third) is None


def test_the_project_with_fewest_running_jobs_comes_first_then_priority_then_age(database):
    with database.transaction() as session:
        busy, idle = make_project(session), make_project(session)
        old = make_queued(session, busy)
        low = make_queued(session, busy, priority=-1)
        high = make_queued(session, busy, priority=5)
        newest = make_queued(session, idle)
        order = [claim(session).job.id for _ in range(4)]
    assert order == [high, newest, old, low]


def test_a_job_goes_only_to_the_class_of_device_that_it_asks_for(database):
    with database.transaction() as session:
        project = make_project(session)
        h200 = make_queued(session, project, gpu_class="h200", priority=9)
        anywhere = make_queued(session, project)
        assert claim(session, gpu_class="any").job.id == anywhere
        assert claim(session, gpu_class="l4") is None
        assert claim(session, gpu_class="h200").job.id == h200


def test_renewal_moves_the_deadline_and_says_what_the_user_wants(database):
    project, held = make_running(database)
    write_old_deadline(database, held.job.id)
    with database.transaction() as session:
        assert renew_lease(session, held.job.id, held.token, 60.0) == Status.RUNNING
        assert expire_leases(session, max_attempts=3) == 0
        cancel_job(session, project, held.job.id)
        assert renew_lease(session, held.job.id, held.token, 60.0) == Status.CANCELLED


def test_an_expired_lease_requeues_the_job_and_the_old_token_writes_nothing(database):
    _, held = make_running(database)
    write_old_deadline(database, held.job.id)
    with database.transaction() as session:
        assert expire_leases(session, max_attempts=3) == 1
    newer = claim_again(database)
    assert (newer.job.id, newer.attempt, newer.job.failures) == (held.job.id, 2, 1)
    calls = [
        lambda session: renew_lease(session, held.job.id, held.token, 60.0),
        lambda session: guard(session, held.job.id, held.token, current_step=9),
        lambda session: release(session, held.job.id, held.token, max_attempts=3, status=Status.SUCCEEDED, reason="late"),
    ]
    for call in calls:
        with pytest.raises(LeaseLost), database.transaction() as session:
            call(session)
    job = read_job(database, held.job.id)
    assert (job.status, job.lease_token, job.current_step, job.finished_at) == (Status.RUNNING, newer.token, None, None)


def test_a_late_finish_before_the_sweep_counts_since_nobody_took_the_job(database):
    _, held = make_running(database)
    write_old_deadline(database, held.job.id)
    assert end(database, held, status=Status.SUCCEEDED).status == Status.SUCCEEDED


def test_success_ends_the_job_the_attempt_and_the_lease(database):
    _, held = make_running(database)
    job = end(database, held, status=Status.SUCCEEDED, reason="succeeded", from_step=2, to_step=6, trained_tokens=640)
    with database.reading() as session:
        attempt = list_attempts(session, job.id)[0]
        newest = list_events(session, job.id, after=None, limit=1).items[0]
    assert (job.status, job.trained_tokens, job.lease_token, job.lease_expires_at) == (Status.SUCCEEDED, 640, None, None)
    assert job.finished_at is not None
    assert (attempt.reason, attempt.from_step, attempt.to_step) == ("succeeded", 2, 6)
    assert attempt.ended_at is not None
    assert newest.message == "The job has successfully completed"
    with pytest.raises(LeaseLost):
        end(database, held, status=Status.FAILED)


def test_a_job_cancelled_while_it_runs_stays_cancelled_at_release(database):
    project, held = make_running(database)
    with database.transaction() as session:
        cancel_job(session, project, held.job.id)
    job = end(database, held, status=Status.SUCCEEDED)
    assert job.status == Status.CANCELLED
    assert job.finished_at is not None
    assert claim_again(database) is None


def test_faults_requeue_until_there_were_too_many_in_a_row(database):
    _, held = make_running(database)
    for failures in (1, 2):
        job = end(database, held, error=CRASH)
        assert (job.status, job.failures, job.error_code, job.finished_at) == (Status.QUEUED, failures, None, None)
        held = claim_again(database)
    job = end(database, held, error=CRASH)
    assert (job.status, job.failures, job.error_code, job.error_message) == (Status.FAILED, 3, "trainer_crashed", "exit code 139")
    assert job.finished_at is not None


def test_a_fault_in_a_wind_down_that_the_user_asked_for_does_not_count(database):
    project, held = make_running(database)
    with database.transaction() as session:
        pause_job(session, project, held.job.id)
    job = end(database, held, error=CRASH)
    assert (job.status, job.failures, job.pause_reason) == (Status.PAUSED, 0, "user")


def test_a_drain_requeues_without_counting_a_fault(database):
    _, held = make_running(database)
    job = end(database, held, reason="drained")
    assert (job.status, job.failures) == (Status.QUEUED, 0)
    assert claim_again(database).job.id == job.id


def test_an_error_that_would_come_again_fails_at_once(database):
    _, held = make_running(database)
    job = end(database, held, error=Diverged("loss is NaN"))
    assert (job.status, job.failures, job.error_code) == (Status.FAILED, 0, "diverged")


def test_a_job_that_pauses_itself_says_why_and_resumes(database):
    project, held = make_running(database)
    job = end(database, held, status=Status.PAUSED, error=GraderUnavailable("down"), pause_reason=PauseReason.GRADER_UNAVAILABLE)
    assert (job.status, job.pause_reason, job.failures, job.finished_at) == (Status.PAUSED, "grader_unavailable", 0, None)
    assert claim_again(database) is None
    with database.transaction() as session:
        assert resume_job(session, project, job.id).pause_reason is None
    assert claim_again(database).job.id == job.id


def test_a_resume_during_the_wind_down_queues_but_starts_only_after_the_release(database):
    project, held = make_running(database)
    with database.transaction() as session:
        pause_job(session, project, held.job.id)
        resume_job(session, project, held.job.id)
        assert count_queued(session) == 0
        assert claim(session) is None
    job = end(database, held, status=Status.PAUSED, reason="paused", pause_reason=PauseReason.USER)
    assert (job.status, job.pause_reason) == (Status.QUEUED, None)
    with database.reading() as session:
        assert count_queued(session) == 1
    assert claim_again(database).attempt == 2


def test_a_claim_over_a_dead_lease_closes_the_attempt_before(database):
    project, held = make_running(database)
    with database.transaction() as session:
        pause_job(session, project, held.job.id)
        resume_job(session, project, held.job.id)
    write_old_deadline(database, held.job.id)
    assert claim_again(database).attempt == 2
    with database.reading() as session:
        first, second = list_attempts(session, held.job.id)
    assert (first.reason, second.ended_at) == ("lease_expired", None)
    with pytest.raises(LeaseLost):
        end(database, held, status=Status.SUCCEEDED)


def test_the_sweep_ends_a_cancelled_job_whose_worker_died(database):
    project, held = make_running(database)
    with database.transaction() as session:
        cancel_job(session, project, held.job.id)
    write_old_deadline(database, held.job.id)
    with database.transaction() as session:
        assert expire_leases(session, max_attempts=3) == 0
    job = read_job(database, held.job.id)
    assert (job.status, job.lease_token) == (Status.CANCELLED, None)
    assert job.finished_at is not None


def test_the_sweep_fails_a_job_that_loses_its_worker_too_often(database):
    _, held = make_running(database)
    with database.transaction() as session:
        session.execute(update(Job).values(failures=2))
    write_old_deadline(database, held.job.id)
    with database.transaction() as session:
        assert expire_leases(session, max_attempts=3) == 0
    job = read_job(database, held.job.id)
    assert (job.status, job.error_code) == (Status.FAILED, "worker_lost")


def test_two_sweeps_at_once_requeue_each_job_once(database):
    with database.transaction() as session:
        project = make_project(session)
        for _ in range(4):
            make_queued(session, project)
            claim(session)
        session.execute(update(Job).values(lease_expires_at=1.0))

    def sweep():
        with database.transaction() as session:
            return expire_leases(session, max_attempts=3)

    assert sum(in_threads([sweep] * 2)) == 4
    with database.reading() as session:
        assert set(session.execute(select(Job.failures)).scalars()) == {1}


def test_claims_at_the_same_time_as_a_cancel_leave_one_truth(database):
    with database.transaction() as session:
        project = make_project(session)
        job_id = make_queued(session, project)

    def cancel():
        with database.transaction() as session:
            cancel_job(session, project, job_id)

    held, _ = in_threads([lambda: claim_again(database), cancel])
    job = read_job(database, job_id)
    assert job.status == Status.CANCELLED
    assert (job.finished_at is None) == (held is not None)


def test_claim_of_an_empty_queue_is_none(database):
    with database.transaction() as session:
        assert claim_job(session, worker="w", host="h", device="cpu", gpu_class="any", lease_seconds=1.0) is None
