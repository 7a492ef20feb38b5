"""Reports about registered graders: asked for by a project, claimed and written by housekeeping under a lease, kept.

A claim gives a new token; what an older token writes is refused.
"""

import secrets
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from core.errors import LeaseLost, NotFound, PlatformError
from database.models import GraderReport
from database.pages import Page
from database.sql import clock, fetch_page, insert_row, new_id, update_row

MAX_TRIES = 3
"""Claims after which a report whose maker keeps dying is given up."""

ReportKind = Literal["test", "regrade"]


class ReportStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


def insert_report(
    session: Session, project_id: str, kind: ReportKind, *, grader_id: str, grader_version: int, request: dict[str, Any]
) -> GraderReport:
    """A report that waits for housekeeping."""
    return insert_row(
        session,
        GraderReport,
        id=new_id("graderreport_"),
        project_id=project_id,
        grader_id=grader_id,
        grader_version=grader_version,
        kind=kind,
        request=request,
        status=ReportStatus.QUEUED,
        created_at=clock(),
        tries=0,
    )


def get_report(session: Session, project_id: str, grader_id: str, report_id: str) -> GraderReport:
    """Raises: NotFound."""
    query = select(GraderReport).where(*_owned(project_id, grader_id), GraderReport.id == report_id)
    report = session.execute(query).scalar_one_or_none()
    if report is None:
        raise NotFound(f"No such report: {report_id}", param="report_id")
    return report


def list_reports(
    session: Session, project_id: str, grader_id: str, *, kind: ReportKind | None, after: str | None, limit: int
) -> Page[GraderReport]:
    """Newest first. Raises: InvalidRequest for an unknown `after`."""
    query = select(GraderReport).where(*_owned(project_id, grader_id))
    if kind is not None:
        query = query.where(GraderReport.kind == kind)
    order = (GraderReport.created_at, GraderReport.id)
    return fetch_page(session, query, order, after=after, limit=limit, id_column=GraderReport.id)


def count_open_reports(session: Session, project_id: str) -> int:
    """Reports of the project that are not finished."""
    query = select(func.count()).where(GraderReport.project_id == project_id, GraderReport.finished_at.is_(None))
    return int(session.execute(query).scalar_one())


def newest_tests(session: Session, versions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], GraderReport]:
    """The newest test of each (grader id, version) that was tested."""
    query = (
        select(GraderReport).where(GraderReport.kind == "test").order_by(GraderReport.created_at.desc(), GraderReport.id.desc()).limit(1)
    )
    found = {}
    for grader_id, number in set(versions):
        is_it = and_(GraderReport.grader_id == grader_id, GraderReport.grader_version == number)
        found[grader_id, number] = session.execute(query.where(is_it)).scalar_one_or_none()
    return {version: report for version, report in found.items() if report is not None}


def is_report_due(session: Session) -> bool:
    """Whether a report waits: never claimed, or its maker's lease has passed."""
    return session.execute(select(GraderReport.id).where(_is_free()).limit(1)).first() is not None


def claim_report(session: Session, lease_seconds: float) -> GraderReport | None:
    """The oldest report that nobody makes, now ours; None when there is none. Its `lease_token` guards what is written."""
    _give_up(session)
    oldest = select(GraderReport.id).where(_is_free()).order_by(GraderReport.created_at, GraderReport.id).limit(1)
    statement = update(GraderReport).where(GraderReport.id == oldest.with_for_update(skip_locked=True).scalar_subquery(), _is_free())
    changes = {
        "status": ReportStatus.RUNNING,
        "tries": GraderReport.tries + 1,
        "started_at": clock(),
        "lease_token": secrets.token_hex(16),
        "lease_expires_at": clock() + lease_seconds,
    }
    return update_row(session, statement.values(changes), GraderReport)


def renew_report(session: Session, report_id: str, token: str, lease_seconds: float) -> None:
    """Raises: LeaseLost."""
    _guarded(session, report_id, token, lease_expires_at=clock() + lease_seconds)


def complete_report(
    session: Session, report_id: str, token: str, *, summary: str, result: dict[str, Any], passed: bool | None = None
) -> GraderReport:
    """Raises: LeaseLost."""
    return _finish(session, report_id, token, status=ReportStatus.COMPLETED, summary=summary, result=result, passed=passed)


def fail_report(session: Session, report_id: str, token: str, error: PlatformError) -> GraderReport:
    """Raises: LeaseLost."""
    return _finish(session, report_id, token, status=ReportStatus.FAILED, error_code=error.code, error_message=error.message)


def _finish(session: Session, report_id: str, token: str, **changes: Any) -> GraderReport:
    return _guarded(session, report_id, token, finished_at=clock(), lease_token=None, lease_expires_at=None, **changes)


def _guarded(session: Session, report_id: str, token: str, **changes: Any) -> GraderReport:
    statement = update(GraderReport).where(GraderReport.id == report_id, GraderReport.lease_token == token)
    report = update_row(session, statement.values(changes), GraderReport)
    if report is None:
        raise LeaseLost(f"The lease on {report_id} was lost: another process makes the report, or it is done.")
    return report


def _give_up(session: Session) -> None:
    """Fails what was claimed too often: its maker dies of it."""
    has_passed = GraderReport.lease_expires_at <= clock()
    statement = update(GraderReport).where(GraderReport.finished_at.is_(None), GraderReport.tries >= MAX_TRIES, has_passed)
    changes = {
        "status": ReportStatus.FAILED,
        "finished_at": clock(),
        "lease_token": None,
        "lease_expires_at": None,
        "error_code": "report_abandoned",
        "error_message": f"The report was begun {MAX_TRIES} times and never came to its end.",
    }
    session.execute(statement.values(changes), execution_options={"synchronize_session": False})


def _is_free() -> ColumnElement[bool]:
    has_passed = or_(GraderReport.lease_expires_at.is_(None), GraderReport.lease_expires_at <= clock())
    return and_(GraderReport.finished_at.is_(None), has_passed)


def _owned(project_id: str, grader_id: str) -> tuple[Any, ...]:
    return GraderReport.project_id == project_id, GraderReport.grader_id == grader_id
