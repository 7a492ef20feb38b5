"""Reports about graders, made one at a time: probes and regrades. A report whose maker dies is begun again by another."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from core.errors import LeaseLost, PlatformError
from core.rows import parse_row
from database.graders import pin_grader, read_secrets
from database.models import GraderReport
from database.reports import claim_report, complete_report, fail_report, is_report_due, renew_report
from database.secrets import load_secrets
from graders.build import build_grader
from graders.probe import MAX_ROWS, ProbeReport, for_probing, probe_grader
from housekeeping.context import Housekeeping
from housekeeping.regrade import make_regrade
from housekeeping.rows import iter_lines

logger = logging.getLogger("hone.housekeeping")


def make_waiting_reports(housekeeping: Housekeeping) -> int:
    """Makes one report after the other until none waits; how many. Returns at once where another thread does it: that one looks again."""
    count = 0
    while _is_due(housekeeping) and housekeeping.reporting.acquire(blocking=False):
        try:
            with housekeeping.database.transaction() as session:
                report = claim_report(session, housekeeping.settings.lease_seconds)
            if report is None:
                break
            _make(housekeeping, report)
            count += 1
        finally:
            housekeeping.reporting.release()
    return count


def _is_due(housekeeping: Housekeeping) -> bool:
    with housekeeping.database.reading() as session:
        return is_report_due(session)


def _make(housekeeping: Housekeeping, report: GraderReport) -> None:
    """Raises: SQLAlchemyError when the database is away; the lease passes then, and the report is begun again."""
    token = report.lease_token or ""
    try:
        with _renewed(housekeeping, report.id, token):
            facts = _MAKERS[report.kind](housekeeping, report)
        with housekeeping.database.transaction() as session:
            complete_report(session, report.id, token, **facts)
    except (SQLAlchemyError, LeaseLost):
        logger.warning("%s: not stored", report.id, exc_info=True)
        raise
    except PlatformError as error:
        _fail(housekeeping, report, error)
    except Exception:
        logger.exception("%s: the report broke", report.id)
        _fail(housekeeping, report, PlatformError("The report could not be made."))


def _fail(housekeeping: Housekeeping, report: GraderReport, error: PlatformError) -> None:
    with housekeeping.database.transaction() as session:
        fail_report(session, report.id, report.lease_token or "", error)


def _test(housekeeping: Housekeeping, report: GraderReport) -> dict[str, Any]:
    with housekeeping.database.reading() as session:
        spec = for_probing(pin_grader(session, report.project_id, report.grader_id, report.grader_version))
        secrets = {spec.secret_ref: read_secrets(session, load_secrets(housekeeping.settings), spec.secret_ref)}
    rows = _rows(housekeeping, report.request.get("blob"))

    async def probe() -> ProbeReport:
        grader = build_grader(spec, secrets, housekeeping.network, housekeeping.limits(report.project_id))
        try:
            return await probe_grader(grader, spec, rows)
        finally:
            await grader.close()

    found = asyncio.run(probe()).as_dict()
    return {"passed": found.pop("passed"), "summary": found.pop("summary"), "result": found}


def _regrade(housekeeping: Housekeeping, report: GraderReport) -> dict[str, Any]:
    outcome = make_regrade(housekeeping, report)
    return {"summary": outcome.summary, "result": outcome.result}


_MAKERS: dict[str, Callable[[Housekeeping, GraderReport], dict[str, Any]]] = {"test": _test, "regrade": _regrade}


def _rows(housekeeping: Housekeeping, blob: str | None) -> list[dict[str, Any]]:
    """The first rows of the file that was given. Raises: InvalidRequest naming a line that is no row; StorageError."""
    rows: list[dict[str, Any]] = []
    if blob is None:
        return rows
    for number, line in iter_lines(housekeeping.blobs.read(blob), "training_file"):
        rows.append(parse_row(line, number, "training_file").item)
        if len(rows) == MAX_ROWS:
            break
    return rows


@contextmanager
def _renewed(housekeeping: Housekeeping, report_id: str, token: str) -> Iterator[None]:
    """Keeps the lease on the report while it is being made."""
    seconds, done = housekeeping.settings.lease_seconds, threading.Event()

    def renew() -> None:
        while not done.wait(seconds / 4):
            try:
                with housekeeping.database.transaction() as session:
                    renew_report(session, report_id, token, seconds)
            except LeaseLost:
                return
            except SQLAlchemyError:
                logger.warning("%s: the lease could not be renewed", report_id, exc_info=True)

    thread = threading.Thread(target=renew, name="report lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
