import pytest
from cryptography.fernet import Fernet
from sqlalchemy import update

from core.errors import InvalidRequest, LeaseLost, NotFound, PlatformError
from core.grader_specs import EndpointOptions
from database.graders import create_grader
from database.models import GraderReport
from database.reports import (
    MAX_TRIES,
    claim_report,
    complete_report,
    count_open_reports,
    fail_report,
    get_report,
    insert_report,
    is_report_due,
    list_reports,
    newest_tests,
    renew_report,
)
from database.secrets import Secrets
from tests.database.rows import in_threads, make_project


def make_grader(session, project=None):
    """(project id, grader id)."""
    project = project or make_project(session)
    secrets, options = Secrets(Fernet.generate_key().decode()), EndpointOptions(url="https://grader.example/")
    return project, create_grader(session, secrets, project, name="mine", options=options, headers={})[0].id


def ask(session, project, grader, kind="test", version=1, **request):
    return insert_report(session, project, kind, grader_id=grader, grader_version=version, request=request)


def write_old_deadline(database):
    with database.transaction() as session:
        session.execute(update(GraderReport).where(GraderReport.lease_token.is_not(None)).values(lease_expires_at=1.0))


def test_a_report_is_claimed_oldest_first_once_and_completed(database):
    with database.transaction() as session:
        project, grader = make_grader(session)
        first, second = ask(session, project, grader, file_id="f"), ask(session, project, grader)
        assert is_report_due(session)
        assert count_open_reports(session, project) == 2
    with database.transaction() as session:
        held = claim_report(session, 60.0)
        assert (held.id, held.status, held.tries, held.request) == (first.id, "running", 1, {"file_id": "f"})
        assert claim_report(session, 60.0).id == second.id
        assert claim_report(session, 60.0) is None
        assert not is_report_due(session)
        complete_report(session, held.id, held.lease_token, summary="fine", result={"a": 1.5}, passed=True)
    with database.reading() as session:
        done = get_report(session, project, grader, first.id)
        assert count_open_reports(session, project) == 1
    assert (done.status, done.summary, done.result, done.passed) == ("completed", "fine", {"a": 1.5}, True)
    assert done.finished_at >= done.started_at >= done.created_at


def test_two_that_claim_at_once_get_different_reports(database):
    with database.transaction() as session:
        project, grader = make_grader(session)
        for _ in range(4):
            ask(session, project, grader)

    def claim():
        with database.transaction() as session:
            report = claim_report(session, 60.0)
            return None if report is None else report.id

    found = [report for report in in_threads([claim] * 4) if report is not None]
    assert len(set(found)) == len(found) >= 1


def test_an_expired_lease_gives_the_report_to_another_and_refuses_the_first(database):
    with database.transaction() as session:
        ask(session, *make_grader(session))
        held = claim_report(session, 60.0)
        renew_report(session, held.id, held.lease_token, 60.0)
    write_old_deadline(database)
    with database.transaction() as session:
        again = claim_report(session, 60.0)
    assert (again.id, again.tries) == (held.id, 2)
    for late in (
        lambda session: complete_report(session, held.id, held.lease_token, summary="", result={}),
        lambda session: fail_report(session, held.id, held.lease_token, PlatformError("no")),
        lambda session: renew_report(session, held.id, held.lease_token, 60.0),
    ):
        with pytest.raises(LeaseLost), database.transaction() as session:
            late(session)
    with database.transaction() as session:
        fail_report(session, again.id, again.lease_token, PlatformError("no", code="c"))
    with database.reading() as session:
        done = session.get(GraderReport, held.id)
        assert not is_report_due(session)
    assert (done.status, done.error_code, done.error_message) == ("failed", "c", "no")


def test_a_report_whose_makers_die_is_given_up(database):
    with database.transaction() as session:
        project, grader = make_grader(session)
        report = ask(session, project, grader)
    for number in range(1, MAX_TRIES + 1):
        with database.transaction() as session:
            assert claim_report(session, 60.0).tries == number
        write_old_deadline(database)
    with database.transaction() as session:
        assert claim_report(session, 60.0) is None
    with database.reading() as session:
        done = get_report(session, project, grader, report.id)
    assert (done.status, done.error_code) == ("failed", "report_abandoned")
    assert done.finished_at is not None


def test_reports_are_the_projects_own_newest_first_and_by_kind(database):
    with database.transaction() as session:
        project, grader = make_grader(session)
        other, foreign = make_grader(session)
        ids = [ask(session, project, grader, kind).id for kind in ("test", "regrade", "test")]
        report = ask(session, other, foreign)
        for ask_for in ((project, foreign), (other, grader), (project, grader)):
            with pytest.raises(NotFound):
                get_report(session, *ask_for, report.id)
        page = list_reports(session, project, grader, kind=None, after=None, limit=2)
        rest = list_reports(session, project, grader, kind=None, after=page.items[-1].id, limit=2)
        tests = list_reports(session, project, grader, kind="test", after=None, limit=5)
        with pytest.raises(InvalidRequest):
            list_reports(session, project, grader, kind=None, after=report.id, limit=2)
    assert [row.id for row in page.items + rest.items] == ids[::-1]
    assert (page.has_more, rest.has_more) == (True, False)
    assert [row.id for row in tests.items] == [ids[2], ids[0]]


def test_the_newest_test_of_each_version_is_found(database):
    with database.transaction() as session:
        project, one = make_grader(session)
        _, two = make_grader(session, project)
        ask(session, project, one)
        newest = ask(session, project, one)
        ask(session, project, one, "regrade")
        newer_version = ask(session, project, one, version=2)
        ask(session, project, two, version=2)
        found = newest_tests(session, [(one, 1), (one, 2), (two, 1)])
        assert newest_tests(session, []) == {}
    assert {version: report.id for version, report in found.items()} == {(one, 1): newest.id, (one, 2): newer_version.id}
