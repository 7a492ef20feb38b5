"""Reports about a registered grader: probes of it, and past samples scored again. Asked for and read here, made by housekeeping."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from sqlalchemy.orm import Session

from api.auth import GraderReader, GraderWriter, JobReader
from api.bodies import JsonBody, OptionalJsonBody, documents, parse_body
from api.errors import TooManyRequests
from api.pagination import After, Limit, ListPage, list_page
from api.requests import ProbeGrader, RegradeJob
from api.schemas import GraderReport
from api.services import Services, get_services
from api.views import report_view
from core.errors import InvalidRequest, NotFound
from database.files import get_file
from database.graders import get_grader, pin_grader
from database.jobs import get_job
from database.reports import ReportKind, count_open_reports, get_report, insert_report, list_reports

router = APIRouter(prefix="/v1/graders/{grader_id}", tags=["graders"])
HasServices = Annotated[Services, Depends(get_services)]
MAX_OPEN_REPORTS = 8
"""Of one project, waiting or being made."""


@router.post("/test", status_code=202, openapi_extra=documents(ProbeGrader, own_rows={"file_id": "file-abc123"}))
def test_grader(grader_id: str, body: OptionalJsonBody, caller: GraderWriter, services: HasServices) -> GraderReport:
    """Probes the grader as a job would use it. Poll the report; jobs that use this version show the newest one."""
    request = parse_body(ProbeGrader, body)
    with services.database.transaction() as session:
        version = _version(session, caller.project_id, grader_id, request.version)
        asked: dict[str, Any] = {"file_id": request.file_id, "blob": None}
        if request.file_id is not None:
            asked["blob"] = _blob(session, caller.project_id, request.file_id)
        report = _insert(session, caller.project_id, "test", grader_id, version, asked)
    services.report_bell.ring()
    return report


@router.post("/regrade", status_code=202, openapi_extra=documents(RegradeJob, evaluations={"job_id": "ftjob-abc123", "phase": "valid"}))
def regrade_job(grader_id: str, body: JsonBody, caller: GraderWriter, reader: JobReader, services: HasServices) -> GraderReport:
    """Scores graded samples of a job with this grader and says how far the two agree. Changes no sample. Poll the report."""
    request = parse_body(RegradeJob, body)
    with services.database.transaction() as session:
        version = _version(session, caller.project_id, grader_id, request.version)
        try:
            get_job(session, reader.project_id, request.job_id)
        except NotFound as error:
            raise InvalidRequest(error.message, code=error.code, param="job_id") from error
        asked = request.model_dump(exclude={"version"})
        report = _insert(session, caller.project_id, "regrade", grader_id, version, asked)
    services.report_bell.ring()
    return report


@router.get("/reports")
def list_all_reports(
    grader_id: str,
    caller: GraderReader,
    services: HasServices,
    kind: Annotated[ReportKind | None, Query()] = None,
    after: After = None,
    limit: Limit = 20,
) -> ListPage[GraderReport]:
    """The grader's reports, newest first."""
    with services.database.reading() as session:
        get_grader(session, caller.project_id, grader_id)
        return list_page(list_reports(session, caller.project_id, grader_id, kind=kind, after=after, limit=limit), report_view)


@router.get("/reports/{report_id}")
def retrieve_report(grader_id: str, report_id: str, caller: GraderReader, services: HasServices) -> GraderReport:
    """One report as it stands."""
    with services.database.reading() as session:
        return report_view(get_report(session, caller.project_id, grader_id, report_id))


def _insert(session: Session, project_id: str, kind: ReportKind, grader_id: str, version: int, asked: dict[str, Any]) -> GraderReport:
    """Raises: TooManyRequests."""
    if count_open_reports(session, project_id) >= MAX_OPEN_REPORTS:
        raise TooManyRequests(f"{MAX_OPEN_REPORTS} reports of this project are being made; wait until one is done.")
    return report_view(insert_report(session, project_id, kind, grader_id=grader_id, grader_version=version, request=asked))


def _version(session: Session, project_id: str, grader_id: str, number: int | None) -> int:
    """`number`, or the newest version. Raises: NotFound for the grader; InvalidRequest for the version."""
    grader, newest = get_grader(session, project_id, grader_id)
    if number is None:
        return newest.version
    try:
        pin_grader(session, project_id, grader_id, number)
    except NotFound as error:
        raise InvalidRequest(f"'version' is {number}; {grader_id} has versions 1 to {grader.version}.", param="version") from error
    return number


def _blob(session: Session, project_id: str, file_id: str) -> str:
    try:
        return get_file(session, project_id, file_id).blob
    except NotFound as error:
        raise InvalidRequest(f"'file_id': {error.message}.", code="file_not_found", param="file_id") from error
