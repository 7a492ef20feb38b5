"""Reports as their project asks for them and reads them. Housekeeping does not run here: what it would write is written by hand."""

from typing import Any

import pytest
from sqlalchemy import update

from api.routers.grader_reports import MAX_OPEN_REPORTS
from core.errors import PlatformError
from database.models import GraderReport
from database.reports import complete_report, fail_report
from tests.api.platform import GRADER, STRING_CHECK, Account, Platform, assert_error

FINDING = {"probe": "schema", "outcome": "passed", "message": "fine", "numbers": {"calls": 3.0}}
PROBED = {"findings": [FINDING], "num_rows": 1, "num_calls": 3, "seconds": 0.5}


def register(owner: Account, **changes: Any) -> str:
    return str(owner.post("/v1/graders", GRADER | changes).json()["id"])


def finish(platform: Platform, report: dict[str, Any], error: PlatformError | None = None, **values: Any) -> None:
    """As housekeeping ends it."""
    with platform.database.transaction() as session:
        session.execute(update(GraderReport).where(GraderReport.id == report["id"]).values(lease_token="t"))
        if error is not None:
            fail_report(session, report["id"], "t", error)
        else:
            complete_report(session, report["id"], "t", **values)


def test_test_is_accepted_and_can_be_polled_until_it_is_done(owner: Account, platform: Platform) -> None:
    grader, file = register(owner), owner.upload()
    answer = owner.post(f"/v1/graders/{grader}/test", {"file_id": file})
    assert answer.status_code == 202
    report = answer.json()
    assert (report["object"], report["kind"], report["status"]) == ("grader.report", "test", "queued")
    assert (report["grader_id"], report["grader_version"], report["request"]) == (grader, 1, {"file_id": file})
    assert (report["result"], report["error"], report["passed"]) == (None, None, None)
    path = f"/v1/graders/{grader}/reports/{report['id']}"
    assert owner.get(path).json() == report
    finish(platform, report, summary="1 of 1 probes passed", result=PROBED, passed=True)
    done = owner.get(path).json()
    assert (done["status"], done["passed"], done["result"]) == ("completed", True, PROBED)
    failed = owner.post(f"/v1/graders/{grader}/test").json()
    finish(platform, failed, PlatformError("it is gone", code="storage_error"))
    shown = owner.get(f"/v1/graders/{grader}/reports/{failed['id']}").json()
    assert (shown["status"], shown["error"]) == ("failed", {"code": "storage_error", "message": "it is gone"})
    assert [item["id"] for item in owner.get(f"/v1/graders/{grader}/reports").json()["data"]] == [failed["id"], report["id"]]
    assert owner.get(f"/v1/graders/{grader}/reports", kind="regrade").json()["data"] == []


def test_housekeeping_is_rung_for_every_report(owner: Account, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[str] = []
    monkeypatch.setattr(platform.http.app.state.services.report_bell, "ring", lambda: rung.append("ring"))
    grader = register(owner)
    owner.post(f"/v1/graders/{grader}/test")
    owner.post(f"/v1/graders/{grader}/regrade", {"job_id": owner.create_job()["id"]})
    assert rung == ["ring", "ring"]


def test_regrade_of_an_older_version_is_asked_for_with_its_defaults(owner: Account) -> None:
    grader, job = register(owner), owner.create_job()["id"]
    owner.post(f"/v1/graders/{grader}", {"timeout_seconds": 5})
    path = f"/v1/graders/{grader}/regrade"
    newest, older = owner.post(path, {"job_id": job}).json(), owner.post(path, {"job_id": job, "version": 1, "phase": "valid"}).json()
    assert (newest["grader_version"], older["grader_version"]) == (2, 1)
    assert newest["request"] == {"job_id": job, "step": None, "phase": None, "max_samples": 200}
    assert older["request"]["phase"] == "valid"


@pytest.mark.parametrize(
    ("route", "body", "code", "param"),
    [
        ("test", {"version": 3}, "invalid_value", "version"),
        ("test", {"version": 0}, "invalid_value", "version"),
        ("test", {"file_id": "file-nothing"}, "file_not_found", "file_id"),
        ("test", {"fil_id": "file-nothing"}, "unknown_parameter", "fil_id"),
        ("regrade", {}, "missing_required_parameter", "job_id"),
        ("regrade", {"job_id": "ftjob-nothing"}, "fine_tune_not_found", "job_id"),
        ("regrade", {"job_id": "ftjob-nothing", "version": 2}, "invalid_value", "version"),
        ("regrade", {"job_id": "ftjob-nothing", "max_samples": 1001}, "invalid_value", "max_samples"),
        ("regrade", {"job_id": "ftjob-nothing", "phase": "test"}, "invalid_value", "phase"),
    ],
)
def test_refused_report_names_its_field_and_writes_nothing(
    route: str, body: dict[str, Any], code: str, param: str, owner: Account, platform: Platform
) -> None:
    grader = register(owner)
    before = platform.count_rows()
    assert_error(owner.post(f"/v1/graders/{grader}/{route}", body), 400, code, param)
    assert platform.count_rows() == before


def test_file_and_job_of_another_project_are_not_there(owner: Account, stranger: Account) -> None:
    grader = register(owner)
    assert_error(owner.post(f"/v1/graders/{grader}/test", {"file_id": stranger.upload()}), 400, "file_not_found", "file_id")
    job = stranger.create_job()["id"]
    assert_error(owner.post(f"/v1/graders/{grader}/regrade", {"job_id": job}), 400, "fine_tune_not_found", "job_id")


def test_reports_of_one_project_that_wait_are_bounded(owner: Account, stranger: Account, platform: Platform) -> None:
    grader = register(owner)
    reports = [owner.post(f"/v1/graders/{grader}/test").json() for _ in range(MAX_OPEN_REPORTS)]
    answer = owner.post(f"/v1/graders/{grader}/test")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert stranger.post(f"/v1/graders/{register(stranger)}/test").status_code == 202
    finish(platform, reports[0], summary="", result=PROBED)
    assert owner.post(f"/v1/graders/{grader}/test").status_code == 202


def test_job_shows_the_newest_test_of_the_version_that_it_pinned(owner: Account, platform: Platform) -> None:
    grader, other = register(owner), register(owner)
    first = owner.post(f"/v1/graders/{grader}/test").json()
    endpoint = {"type": "endpoint", "grader_id": grader}
    assert owner.create_job(grader=endpoint)["grader_reports"][0]["id"] == first["id"]
    multi = {"type": "multi", "graders": {"a": endpoint, "b": endpoint | {"grader_id": other}}, "calculate_output": "a + b"}
    jobs = [owner.create_job(grader=spec)["id"] for spec in (endpoint, multi, STRING_CHECK)]
    owner.post(f"/v1/graders/{grader}", {"timeout_seconds": 5})
    owner.post(f"/v1/graders/{grader}/test")
    newest = owner.post(f"/v1/graders/{grader}/test", {"version": 1}).json()
    finish(platform, newest, summary="0 of 1 probes passed", result=PROBED, passed=False)
    shown = {
        "id": newest["id"],
        "grader_id": grader,
        "grader_version": 1,
        "status": "completed",
        "passed": False,
        "summary": "0 of 1 probes passed",
    }
    wanted = [[shown], [shown], []]
    assert [owner.get(f"/v1/fine_tuning/jobs/{job}").json()["grader_reports"] for job in jobs] == wanted
    listed = {job["id"]: job["grader_reports"] for job in owner.get("/v1/fine_tuning/jobs").json()["data"]}
    assert [listed[job] for job in jobs] == wanted
    assert owner.post(f"/v1/fine_tuning/jobs/{jobs[0]}/cancel").json()["grader_reports"] == [shown]
