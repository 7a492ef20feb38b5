"""Reports as housekeeping makes them: a registered grader on a real server, rows and samples of a real job."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update

from core.grader_specs import EndpointOptions
from core.run_directory import SAMPLES
from core.settings import Settings
from database.base_models import register_model
from database.blobs import BlobStore
from database.files import delete_file, insert_file
from database.graders import add_grader_version, create_grader, delete_grader
from database.jobs import get_job, insert_job
from database.leases import claim_job
from database.models import GraderReport
from database.progress import store_samples
from database.projects import create_project
from database.reports import claim_report, get_report, insert_report
from database.secrets import Secrets, ensure_secret_key, load_secrets
from database.session import Database
from housekeeping.context import Housekeeping
from housekeeping.regrade import MAX_DISAGREEMENTS, make_regrade
from housekeeping.reports import make_waiting_reports
from housekeeping.validate_job import validate_waiting_jobs
from outbound.signing import verify
from tests.database.rows import new_job, sample_line
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, answer, score, status
from tests.housekeeping.test_validate_job import SilentBell, as_lines, row

only_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
TOKEN = "Bearer report-token"


@pytest.fixture
def housekeeping(settings: Settings, database: Database, valkey_url: str) -> Housekeeping:
    settings = settings.model_copy(update={"allowed_private_networks": LOOPBACK, "broker_url": SecretStr(valkey_url)})
    ensure_secret_key(settings)
    return Housekeeping(settings, database, BlobStore(database, settings), SilentBell())


class Scene:
    """A project with a grader; its endpoint answers with the newest of `replies`' version: {header "x-version": reply}."""

    def __init__(self, housekeeping: Housekeeping, endpoint: FakeEndpoint, **options: Any) -> None:
        self.housekeeping, self.endpoint = housekeeping, endpoint
        self.secrets: Secrets = load_secrets(housekeeping.settings)
        self.options = EndpointOptions(url=endpoint.url, **{"max_concurrency": 4, **options})
        with housekeeping.database.transaction() as session:
            self.project = create_project(session, "team").id
            headers = {"authorization": TOKEN, "x-version": "1"}
            grader, _, self.signing_secret = create_grader(
                session, self.secrets, self.project, name="mine", options=self.options, headers=headers
            )
            self.grader = grader.id

    def ask(self, kind: Any, version: int = 1, **request: Any) -> str:
        with self.housekeeping.database.transaction() as session:
            return insert_report(session, self.project, kind, grader_id=self.grader, grader_version=version, request=request).id

    def report(self, report_id: str) -> GraderReport:
        with self.housekeeping.database.reading() as session:
            return get_report(session, self.project, self.grader, report_id)

    def made(self, kind: Any, version: int = 1, **request: Any) -> GraderReport:
        report_id = self.ask(kind, version, **request)
        assert make_waiting_reports(self.housekeeping) == 1
        return self.report(report_id)

    def upload(self, content: bytes) -> Any:
        stored = self.housekeeping.blobs.put([content], kind="file")
        with self.housekeeping.database.transaction() as session:
            return insert_file(session, self.project, filename="rows.jsonl", purpose="fine-tune", blob=stored)

    def job(self, training: bytes, validation: bytes | None, samples: list[Any]) -> str:
        """A job that is validated and has these samples."""
        file = self.upload(training)
        other = None if validation is None else self.upload(validation)
        pinned = {"training_file": file.id, "training_blob": file.blob}
        if other is not None:
            pinned |= {"validation_file": other.id, "validation_blob": other.blob}
        with self.housekeeping.database.transaction() as session:
            name = f"tiny-{self.project}"
            register_model(
                session, name=name, project_id=self.project, kind="base", source={"type": "folder", "path": "/m"}, digest="d" * 64
            )
            job_id = insert_job(session, new_job(self.project, model=name, **pinned)).id
        validate_waiting_jobs(self.housekeeping)
        with self.housekeeping.database.transaction() as session:
            claimed = claim_job(session, worker="w", host="h", device="cpu", gpu_class="any", lease_seconds=60.0)
            assert claimed is not None
            store_samples(session, job_id, claimed.token, 1, file=SAMPLES, offset=9, lines=samples)
        return job_id


@pytest.fixture
def scene(housekeeping: Housekeeping) -> Iterator[Scene]:
    with FakeEndpoint(lambda received: score(right(received))) as endpoint:
        yield Scene(housekeeping, endpoint)


def right(received: Received) -> float:
    body = received.json
    return 1.0 if body["sample"]["output_text"] == body["item"]["answer"] else 0.25


def test_test_probes_with_the_projects_rows_signed_and_with_its_headers(scene: Scene) -> None:
    file = scene.upload(as_lines([row(number) for number in range(3)]))
    report = scene.made("test", file_id=file.id, blob=file.blob)
    assert (report.status, report.passed, report.summary) == ("completed", True, "9 of 9 probes passed")
    assert report.result is not None
    assert (report.result["num_rows"], report.result["num_calls"]) == (3, len(scene.endpoint.requests))
    assert {request.json["item"]["answer"] for request in scene.endpoint.requests} == {"0", "1", "2"}
    for request in scene.endpoint.requests:
        verify(scene.signing_secret, request.headers, request.body)
        assert request.headers["authorization"] == TOKEN
        assert request.json["metadata"]["grader_version"] == f"{scene.grader}@1"


@only_sqlite
def test_version_that_is_asked_for_is_the_one_that_is_probed(scene: Scene) -> None:
    with scene.housekeeping.database.transaction() as session:
        add_grader_version(session, scene.secrets, scene.project, scene.grader, options=scene.options, headers={"x-version": "2"})
    for version in (1, 2):
        before = len(scene.endpoint.requests)
        scene.made("test", version)
        assert {request.headers["x-version"] for request in scene.endpoint.requests[before:]} == {str(version)}


@only_sqlite
def test_report_holds_no_secret_that_the_grader_echoes(housekeeping: Housekeeping) -> None:
    with FakeEndpoint(lambda received: status(400, json.dumps(received.headers).encode())) as endpoint:
        report = Scene(housekeeping, endpoint).made("test")
    assert (report.status, report.passed) == ("completed", False)
    assert "report-token" not in json.dumps(report.result)
    assert "**********" in json.dumps(report.result)


@only_sqlite
def test_address_that_is_not_allowed_is_not_probed(housekeeping: Housekeeping) -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        scene = Scene(housekeeping, endpoint)
        object.__setattr__(housekeeping, "settings", housekeeping.settings.model_copy(update={"allowed_private_networks": ()}))
        report = scene.made("test")
        assert endpoint.requests == []
    assert (report.status, report.error_code) == ("failed", "address_refused")


@only_sqlite
def test_what_cannot_be_made_fails_with_its_reason(scene: Scene) -> None:
    broken = scene.upload(b'{"messages": []}\n')
    bad = scene.made("test", file_id=broken.id, blob=broken.blob)
    assert (bad.status, bad.error_code) == ("failed", "invalid_training_file")
    assert "Line 1" in (bad.error_message or "")
    gone = scene.made("test", file_id="file-x", blob="blob_gone")
    assert (gone.status, gone.error_code) == ("failed", "storage_error")
    job = scene.job(as_lines([row(number) for number in range(12)]), None, [sample_line(1, 0, None)])
    empty = scene.made("regrade", job_id=job, step=None, phase=None, max_samples=5)
    assert (empty.status, empty.error_code) == ("failed", "no_samples")
    waiting = scene.ask("test")
    with scene.housekeeping.database.transaction() as session:
        delete_grader(session, scene.project, scene.grader)
    assert make_waiting_reports(scene.housekeeping) == 1
    assert scene.report(waiting).error_code == "not_found"


@only_sqlite
def test_report_of_a_process_that_died_is_made_again(scene: Scene) -> None:
    report_id = scene.ask("test")
    with scene.housekeeping.database.transaction() as session:
        assert claim_report(session, 60.0) is not None
    assert make_waiting_reports(scene.housekeeping) == 0
    with scene.housekeeping.database.transaction() as session:
        session.execute(update(GraderReport).values(lease_expires_at=1.0))
    assert make_waiting_reports(scene.housekeeping) == 1
    report = scene.report(report_id)
    assert (report.status, report.tries) == ("completed", 2)


@only_sqlite
def test_one_thread_makes_reports_and_the_others_go_on(scene: Scene) -> None:
    scene.ask("test")
    with scene.housekeeping.reporting:
        assert make_waiting_reports(scene.housekeeping) == 0
    assert make_waiting_reports(scene.housekeeping) == 1


def rank_grader(received: Received) -> Reply:
    """Says with its explanation which row it saw."""
    body = received.json
    text, explanation = body["sample"]["output_text"], body["item"]["answer"]
    if text == "broken":
        return status(404)
    if text == "abstain":
        return answer({"score": None})
    return answer({"score": float(text), "explanation": explanation})


def regraded(scene: Scene, job: str, **request: Any) -> dict[str, Any]:
    report = scene.made("regrade", **{"job_id": job, "step": None, "phase": None, "max_samples": 100, **request})
    assert report.status == "completed", report.error_message
    assert report.result is not None
    return {**report.result, "summary": report.summary}


def test_regrade_compares_what_both_scored_and_counts_the_rest(housekeeping: Housekeeping) -> None:
    texts = ["10", "20", "40", "30", "broken", "abstain"]
    samples = [sample_line(1, g, 0.1 * (g + 1), completion=text) for g, text in enumerate(texts)]
    samples.append(sample_line(1, 6, None, completion="50", error="grader_timeout"))
    with FakeEndpoint(rank_grader) as endpoint:
        scene = Scene(housekeeping, endpoint, max_attempts=2)
        job = scene.job(as_lines([row(number) for number in range(12)]), as_lines([row(99)]), samples)
        found = regraded(scene, job)
        verify(scene.signing_secret, endpoint.requests[0].headers, endpoint.requests[0].body)
        asked = {request.json["sample"]["output_text"] for request in endpoint.requests}
    assert asked == set(texts)
    names = ("num_graded_samples", "num_asked", "num_compared", "num_abstained", "num_failed", "num_not_reached")
    assert [found[name] for name in names] == [6, 6, 4, 1, 1, 0]
    assert found["failures"] == {"grader_http_error": 1}
    assert "404" in found["first_failure"]
    assert (found["spearman"], found["kendall"]) == (pytest.approx(0.8), pytest.approx(4 / 6))
    assert (found["old_mean"], found["new_mean"]) == (pytest.approx(0.25), 25.0)
    assert found["old_grader_versions"] == ["inline"]
    moved = [(each["old_reward"], each["new_reward"], each["old_rank"], each["new_rank"]) for each in found["disagreements"]]
    assert [entry[2:] for entry in moved] == [(3.0, 4.0), (4.0, 3.0), (2.0, 2.0), (1.0, 1.0)]
    assert [entry[1] for entry in moved[:2]] == [40.0, 30.0]
    assert found["summary"] == "Spearman 0.800, Kendall 0.667 over 4 of 6 samples, 1 failed, 1 abstained."


@pytest.mark.parametrize("is_split", [True, False])
def test_sample_is_graded_with_the_row_that_it_answers(is_split: bool, housekeeping: Housekeeping) -> None:
    """Also where the rows for validation were held out of one file: what lies in the job's own blobs says which row is which."""
    training, validation = as_lines([row(number) for number in range(30)]), as_lines([row(number) for number in range(50, 53)])
    samples = [
        sample_line(1, 0, index / 100, phase=phase, prompt_index=index, completion=str(index))
        for phase, count in (("train", 27), ("valid", 3))
        for index in range(count)
    ]
    with FakeEndpoint(rank_grader) as endpoint:
        scene = Scene(housekeeping, endpoint)
        job_id = scene.job(training, None if is_split else validation, samples)
        with housekeeping.database.reading() as session:
            job = get_job(session, scene.project, job_id)
        files = {"train": job.training_blob, "valid": job.validation_blob}
        with housekeeping.database.transaction() as session:
            delete_file(session, scene.project, job.training_file)
        for phase, blob in files.items():
            before = len(endpoint.requests)
            regraded(scene, job_id, phase=phase)
            lines = [json.loads(line)["answer"] for line in b"".join(housekeeping.blobs.read(str(blob))).splitlines()]
            asked = {int(request.json["sample"]["output_text"]): request.json["item"]["answer"] for request in endpoint.requests[before:]}
            assert asked == dict(enumerate(lines[:27]))


@only_sqlite
def test_regrade_is_bounded_and_the_list_of_disagreements_too(housekeeping: Housekeeping) -> None:
    samples = [sample_line(step, 0, float(step), completion=str(-step)) for step in range(1, 61)]
    with FakeEndpoint(rank_grader) as endpoint:
        scene = Scene(housekeeping, endpoint)
        job = scene.job(as_lines([row(number) for number in range(12)]), None, samples)
        found = regraded(scene, job, max_samples=30)
        assert len(endpoint.requests) == 30
    assert (found["num_graded_samples"], found["num_asked"], found["spearman"]) == (60, 30, pytest.approx(-1.0))
    assert len(found["disagreements"]) == MAX_DISAGREEMENTS
    assert {found["disagreements"][0]["step"], found["disagreements"][1]["step"]} == {1, 59}


@only_sqlite
def test_regrade_that_takes_too_long_counts_what_it_did_not_reach(housekeeping: Housekeeping) -> None:
    samples = [sample_line(step, 0, float(step), completion=str(step)) for step in range(1, 5)]

    def plan(received: Received) -> Reply:
        return score(1.0, is_held=lambda: received.json["sample"]["output_text"] in ("3", "4"))

    with FakeEndpoint(plan) as endpoint:
        scene = Scene(housekeeping, endpoint)
        job = scene.job(as_lines([row(number) for number in range(12)]), None, samples)
        report_id = scene.ask("regrade", job_id=job, step=None, phase=None, max_samples=5)
        with housekeeping.database.reading() as session:
            report = session.execute(select(GraderReport).where(GraderReport.id == report_id)).scalar_one()
        outcome = make_regrade(housekeeping, report, deadline_seconds=2.0)
        endpoint.wait_until_idle()
    assert (outcome.result["num_compared"], outcome.result["num_not_reached"]) == (2, 2)
    assert outcome.result["spearman"] is None
    assert outcome.summary.startswith("No rank correlation over 2 of 4 samples")
