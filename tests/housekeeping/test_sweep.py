"""When a lease is taken from its holder, and what is rung. Time is an argument; deadlines are written, not waited for."""

import pytest

from core.lifecycle import Status
from core.settings import Settings
from database.blobs import BlobStore
from database.jobs import insert_job
from database.session import Database
from housekeeping.context import Housekeeping
from housekeeping.sweep import MAX_RINGS, Sweep
from tests.database.rows import make_project, make_queued, make_running, new_job, read_job, write_old_deadline
from tests.housekeeping.test_validate_job import SilentBell


@pytest.fixture
def housekeeping(settings: Settings, database: Database) -> Housekeeping:
    settings = settings.model_copy(update={"lease_seconds": 120.0, "sweep_seconds": 15.0})
    return Housekeeping(settings, database, BlobStore(database, settings), SilentBell())


def sweep_from(sweep: Sweep, start: float, end: float) -> None:
    now = start
    while now <= end:
        sweep.run(now)
        now += 15.0


def test_lease_expires_only_after_a_whole_lease_of_reachable_database(housekeeping: Housekeeping, database: Database) -> None:
    _, claimed = make_running(database)
    write_old_deadline(database, claimed.job.id)
    sweep = Sweep(housekeeping, 0.0)
    sweep_from(sweep, 0.0, 119.0)
    assert read_job(database, claimed.job.id).status == Status.RUNNING
    sweep.run(120.0)
    job = read_job(database, claimed.job.id)
    assert (job.status, job.lease_token) == (Status.QUEUED, None)
    assert "worker" in housekeeping.doorbell.rung


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
@pytest.mark.parametrize("gap", ["error", "silence"])
def test_gap_begins_the_waiting_anew(housekeeping: Housekeeping, database: Database, monkeypatch: pytest.MonkeyPatch, gap: str) -> None:
    _, claimed = make_running(database)
    sweep = Sweep(housekeeping, 0.0)
    sweep_from(sweep, 0.0, 300.0)
    write_old_deadline(database, claimed.job.id)
    if gap == "error":
        with monkeypatch.context() as patch:
            patch.setattr("housekeeping.sweep.count_queued", lambda session: 1 / 0)
            patch.setattr("housekeeping.sweep.expire_leases", lambda session, max_attempts: 0)
            with pytest.raises(ZeroDivisionError):
                sweep.run(315.0)
        back = 330.0
    else:
        back = 500.0
    sweep_from(sweep, back, back + 119.0)
    assert read_job(database, claimed.job.id).status == Status.RUNNING
    sweep.run(back + 120.0)
    assert read_job(database, claimed.job.id).status == Status.QUEUED


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_rings_are_few_however_many_wait(housekeeping: Housekeeping, database: Database) -> None:
    sweep = Sweep(housekeeping, 0.0)
    sweep.run(1.0)
    assert housekeeping.doorbell.rung == []
    with database.transaction() as session:
        project = make_project(session)
        for _ in range(3 * MAX_RINGS):
            make_queued(session, project)
        insert_job(session, new_job(project))
    sweep.run(2.0)
    assert housekeeping.doorbell.rung == ["worker"] * MAX_RINGS + ["validation"]
