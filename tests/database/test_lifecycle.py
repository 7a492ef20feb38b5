"""The lifecycle as a state machine, beside a model that knows only who was given which token and what the user asked for."""

from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule, run_state_machine_as_test
from sqlalchemy import select, update

from core.errors import InvalidTransition, LeaseLost, TrainerCrashed
from core.lifecycle import TERMINAL, TRANSITIONS, Status
from database.checkpoints import publish_resume_point
from database.jobs import cancel_job, insert_job, mark_validated, pause_job, resume_job
from database.leases import count_queued, expire_leases, release, renew_lease
from database.models import Attempt, Job, ResumePoint
from tests.conftest import empty_tables
from tests.database.rows import claim, make_project, manifest, new_job

MAX_ATTEMPTS = 2


def reachable():
    """status -> every status that a chain of allowed changes leads to."""
    closure = {status: set(targets) | {status} for status, targets in TRANSITIONS.items()}
    for _ in closure:
        for status, targets in closure.items():
            closure[status] = targets.union(*(closure[target] for target in targets))
    return closure


REACHABLE = reachable()


class Lifecycle(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    leases = Bundle("leases")
    database = None

    def __init__(self):
        super().__init__()
        empty_tables(self.database)
        with self.database.transaction() as session:
            self.project = make_project(session)
        self.last = {}
        self.tokens = {}
        """job -> the token given last: the only one that may write."""
        self.cancelled = set()
        self.faults = {}

    @precondition(lambda self: len(self.faults) < 3)
    @rule(target=jobs, is_valid=st.sampled_from([True, True, False]))
    def submit(self, is_valid):
        with self.database.transaction() as session:
            job = insert_job(session, new_job(self.project)).id
            if is_valid:
                mark_validated(session, job, num_training_rows=9, num_validation_rows=1, validation_blob=None, total_steps=3)
        self.faults[job] = 0
        return job

    @rule(target=leases)
    def claim(self):
        with self.database.transaction() as session:
            waiting = count_queued(session)
            held = claim(session)
        assert (held is None) == (waiting == 0)
        if held is None:
            return multiple()
        self.tokens[held.job.id] = held.token
        return held

    @rule(lease=leases)
    def renew(self, lease):
        with self.database.transaction() as session:
            self.write(lease, lambda: renew_lease(session, lease.job.id, lease.token, 60.0))

    @rule(lease=leases)
    def expire(self, lease):
        """The deadline passes while `lease` holds the job."""
        with self.database.transaction() as session:
            statement = update(Job).where(Job.id == lease.job.id, Job.lease_token == lease.token)
            session.execute(statement.values(lease_expires_at=1.0))

    @rule()
    def sweep(self):
        with self.database.transaction() as session:
            expired = set(session.execute(select(Job.id).where(Job.lease_expires_at == 1.0)).scalars())
            expire_leases(session, max_attempts=MAX_ATTEMPTS)
        for job in expired:
            self.end(job, is_fault=True)

    @rule(lease=leases)
    def publish(self, lease):
        with self.database.transaction() as session:
            published = self.write(
                lease,
                lambda: publish_resume_point(
                    session, lease.job.id, lease.token, step=lease.attempt, manifest=manifest(kind="resume_point"), files=[]
                ),
            )
        if published:
            self.faults[lease.job.id] = 0

    @rule(lease=consumes(leases), how=st.sampled_from(["succeeded", "paused", "drained", "crashed"]))
    def release(self, lease, how):
        status = {"succeeded": Status.SUCCEEDED, "paused": Status.PAUSED}.get(how)
        error = TrainerCrashed("crash") if how == "crashed" else None
        with self.database.transaction() as session:
            released = self.write(
                lease,
                lambda: release(session, lease.job.id, lease.token, max_attempts=MAX_ATTEMPTS, status=status, error=error, reason=how),
            )
        if released:
            self.end(lease.job.id, is_fault=how == "crashed")

    @rule(job=jobs, change=st.sampled_from([cancel_job, pause_job, resume_job]))
    def ask(self, job, change):
        with self.database.transaction() as session:
            before = session.get(Job, job).status
            held = session.get(Job, job).lease_token if session.get(Job, job).lease_expires_at != 1.0 else None
            try:
                change(session, self.project, job)
            except InvalidTransition:
                assert change is not cancel_job or before in TERMINAL
                return
        if change is cancel_job:
            self.cancelled.add(job)
            self.tokens[job] = held

    def end(self, job, *, is_fault):
        self.tokens[job] = None
        self.faults[job] += is_fault and self.last[job] == Status.RUNNING

    def write(self, lease, action):
        """Whether `action` was let through, which it must be exactly for the newest token."""
        is_current = self.tokens.get(lease.job.id) == lease.token
        try:
            action()
        except LeaseLost:
            assert not is_current
            return False
        assert is_current
        return True

    @invariant()
    def nothing_is_broken(self):
        with self.database.reading() as session:
            attempts = session.execute(select(Attempt).order_by(Attempt.attempt)).scalars().all()
            resumable = set(session.execute(select(ResumePoint.job_id)).scalars())
            for job in session.execute(select(Job)).scalars():
                before, self.last[job.id] = self.last.get(job.id, Status.VALIDATING_FILES), job.status
                assert job.status in REACHABLE[before]
                assert job.lease_token == self.tokens.get(job.id), "one holder at most: the newest claim"
                assert (job.lease_token is None) == (job.lease_expires_at is None)
                assert job.status != Status.RUNNING or job.lease_token is not None, "a running job has a holder"
                assert job.id not in self.cancelled or job.status == Status.CANCELLED, "cancelled is final"
                assert (job.finished_at is not None) == (job.status in TERMINAL and job.lease_token is None)
                assert job.failures == self.faults[job.id]
                assert job.failures <= MAX_ATTEMPTS, "attempts are bounded"
                assert job.failures < MAX_ATTEMPTS or job.status == Status.FAILED
                assert job.finished_at is None or job.id not in resumable
                mine = [attempt for attempt in attempts if attempt.job_id == job.id]
                assert [attempt.attempt for attempt in mine] == list(range(1, job.attempt + 1))
                is_open = [attempt.attempt for attempt in mine if attempt.ended_at is None]
                assert is_open == ([job.attempt] if job.lease_token is not None else [])


def test_lifecycle_keeps_its_promises_under_any_order_of_events(database):
    class Machine(Lifecycle):
        pass

    Machine.database = database
    run_state_machine_as_test(
        Machine,
        settings=hypothesis_settings(
            max_examples=18,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
