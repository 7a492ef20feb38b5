"""Who brings a job back that paused for its grader, and when. Deadlines are written, not waited for."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select, update
from standardwebhooks import Webhook

from core.grader_specs import PinnedEndpointGrader
from core.lifecycle import PauseReason, Status
from core.settings import Settings
from database.blobs import BlobStore
from database.jobs import cancel_job, pause_job, resume_job
from database.leases import release
from database.models import Event, Job, Sample
from database.progress import store_metrics, store_samples
from database.secrets import ensure_secret_key, load_secrets
from database.session import Database
from housekeeping.context import Housekeeping
from housekeeping.probe_graders import GraderProbe
from housekeeping.sweep import Sweep
from outbound.signing import generate_secret
from tests.database.rows import claim, make_running, metrics_line, read_job, sample_line
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, score, status
from tests.housekeeping.test_validate_job import SilentBell

SECRET = generate_secret()
ROWS = b"".join(b'{"messages": [{"role": "user", "content": "%d"}], "answer": "%d"}\n' % (n, n) for n in range(3))
only_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


@pytest.fixture
def housekeeping(settings: Settings, database: Database, valkey_url: str) -> Housekeeping:
    ensure_secret_key(settings)
    settings = settings.model_copy(update={"allowed_private_networks": LOOPBACK, "broker_url": SecretStr(valkey_url)})
    return Housekeeping(settings, database, BlobStore(database, settings), SilentBell())


def make_waiting(housekeeping: Housekeeping, url: str) -> tuple[str, Job]:
    """(project, job): its grader at `url` was away in step 2, so that it paused. Completion "right" of row 2 was graded in step 1."""
    database = housekeeping.database
    fixed: dict[str, Any] = {"type": "endpoint", "secret_ref": "inline", "grader_version": "inline", "max_attempts": 1}
    stored = {"inline": {"headers": {"x-token": "t0ken"}, "signing_secret": SECRET}}
    project, held = make_running(
        database,
        grader=PinnedEndpointGrader(url=url, **fixed),
        secrets=load_secrets(housekeeping.settings).encrypt(stored),
        training_blob=housekeeping.blobs.put([ROWS], kind="file").id,
    )
    lines = [
        sample_line(1, 0, 1.0, prompt_index=2, completion="right"),
        sample_line(1, 1, None, prompt_index=2, completion="lost", error="grader_timeout"),
    ]
    with database.transaction() as session:
        store_samples(session, held.job.id, held.token, 1, file="samples.jsonl", offset=9, lines=lines)
    pause_for_grader(database, held)
    return project, read_job(database, held.job.id)


def pause_for_grader(database: Database, held: Any) -> None:
    with database.transaction() as session:
        release(
            session,
            held.job.id,
            held.token,
            max_attempts=3,
            status=Status.PAUSED,
            reason="grader_unavailable",
            pause_reason=PauseReason.GRADER_UNAVAILABLE,
        )


def probe(housekeeping: Housekeeping) -> int:
    return GraderProbe(housekeeping, load_secrets(housekeeping.settings)).run()


def let_time_pass(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(probe_at=1.0))


def events(database: Database, job_id: str, code: str) -> list[dict[str, Any]]:
    with database.reading() as session:
        found = session.execute(select(Event).where(Event.job_id == job_id).order_by(Event.seq)).scalars()
        return [{"message": event.message, **event.data} for event in found if event.data.get("code") == code]


def test_job_whose_grader_grades_again_goes_back_to_the_queue(housekeeping: Housekeeping, database: Database) -> None:
    with FakeEndpoint([score(0.25)]) as endpoint:
        _, job = make_waiting(housekeeping, endpoint.url)
        Sweep(housekeeping, 0.0).run(1.0)
        assert housekeeping.doorbell.rung == ["probe"]
        assert probe(housekeeping) == 1
        (received,) = endpoint.requests
    job = read_job(database, job.id)
    assert (job.status, job.pause_reason) == (Status.QUEUED, None)
    assert housekeeping.doorbell.rung == ["probe", "worker"]
    assert len(events(database, job.id, "grader_available")) == 1
    Webhook(SECRET).verify(received.body, received.headers)
    assert received.headers["x-token"] == "t0ken"
    asked = received.json
    assert (asked["sample"]["output_text"], asked["item"]["answer"], asked["metadata"]["probe"]) == ("right", "2", True)


def test_probe_is_no_sample(housekeeping: Housekeeping, database: Database) -> None:
    with FakeEndpoint([score(0.25)]) as endpoint:
        make_waiting(housekeeping, endpoint.url)
        probe(housekeeping)
    with database.reading() as session:
        assert session.execute(select(func.count()).select_from(Sample).where(Sample.reward == 0.25)).scalar_one() == 0
        assert session.execute(select(func.count()).select_from(Sample)).scalar_one() == 2


def test_probes_in_vain_become_ever_rarer(housekeeping: Housekeeping, database: Database) -> None:
    with FakeEndpoint([status(503)]) as endpoint:
        _, job = make_waiting(housekeeping, endpoint.url)
        for _ in range(9):
            assert probe(housekeeping) == 0
            assert probe(housekeeping) == 0, "its turn has not come"
            let_time_pass(database, job.id)
        assert len(endpoint.requests) == 9
    told = events(database, job.id, "grader_probed")
    assert [event["next_probe_seconds"] for event in told] == [15, 30, 60, 120, 240, 480, 960, 1800, 1800]
    assert "HTTP 503" in told[0]["message"]
    assert read_job(database, job.id).status == Status.PAUSED


@only_sqlite
@pytest.mark.parametrize("reply", [score(float("nan")), Reply(b"<html>"), status(404)], ids=["NaN", "HTML", "404"])
def test_grader_that_answers_without_grading_is_not_back(housekeeping: Housekeeping, database: Database, reply: Reply) -> None:
    with FakeEndpoint([reply]) as endpoint:
        _, job = make_waiting(housekeeping, endpoint.url)
        assert probe(housekeeping) == 0
    assert read_job(database, job.id).status == Status.PAUSED


@only_sqlite
def test_probe_goes_only_where_calls_may_go(housekeeping: Housekeeping, database: Database) -> None:
    strict = Housekeeping(
        housekeeping.settings.model_copy(update={"allowed_private_networks": (), "allow_http_graders": True}),
        database,
        housekeeping.blobs,
        housekeeping.doorbell,
    )
    with FakeEndpoint([score(1.0)]) as endpoint:
        _, job = make_waiting(housekeeping, endpoint.url)
        assert probe(strict) == 0
        assert endpoint.requests == []
    assert "not public" in events(database, job.id, "grader_probed")[0]["message"]


def cancel(database: Database, project: str, job_id: str) -> Status:
    with database.transaction() as session:
        return Status(cancel_job(session, project, job_id).status)


def pause(database: Database, project: str, job_id: str) -> Status:
    with database.transaction() as session:
        return Status(pause_job(session, project, job_id).status)


@pytest.mark.parametrize(("act", "wanted"), [(cancel, Status.CANCELLED), (pause, Status.PAUSED)])
@pytest.mark.parametrize("when", ["before", "while it is probed"])
def test_what_the_user_did_stands(
    housekeeping: Housekeeping, database: Database, act: Callable[[Database, str, str], Status], wanted: Status, when: str
) -> None:
    waiting: list[tuple[str, str]] = []

    def answer(received: Received) -> Reply:
        for project, job_id in waiting:
            act(database, project, job_id)
        return score(1.0)

    with FakeEndpoint(answer) as endpoint:
        project, job = make_waiting(housekeeping, endpoint.url)
        if when == "before":
            assert act(database, project, job.id) == wanted
        else:
            waiting.append((project, job.id))
        assert probe(housekeeping) == 0
        assert len(endpoint.requests) == (when != "before")
    job = read_job(database, job.id)
    assert (job.status, job.pause_reason) == (wanted, PauseReason.USER if wanted == Status.PAUSED else None)
    assert housekeeping.doorbell.rung == []


@only_sqlite
def test_grader_that_only_answers_probes_is_asked_ever_less_often_until_a_step_is_done(
    housekeeping: Housekeeping, database: Database
) -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        project, job = make_waiting(housekeeping, endpoint.url)
        for probes in (1, 2):
            assert probe(housekeeping) == 1
            with database.transaction() as session:
                held = claim(session)
            pause_for_grader(database, held)
            assert read_job(database, job.id).probes == probes
            assert probe(housekeeping) == 0, "it paused again at once: its turn has not come"
            let_time_pass(database, job.id)
        assert probe(housekeeping) == 1
        with database.transaction() as session:
            held = claim(session)
            store_metrics(session, job.id, held.token, 2, file="metrics.jsonl", offset=9, lines=[metrics_line(2, reward_mean=1.0)])
        pause_for_grader(database, held)
        assert (read_job(database, job.id).probes, read_job(database, job.id).probe_at) == (0, None)
        with database.transaction() as session:
            assert resume_job(session, project, job.id).probes == 0
