"""What is polled must not read whole tables: SQLite tells how it would run each statement."""

import re

import pytest
from sqlalchemy import event, select

from core.settings import Settings
from database.files import list_files
from database.jobs import jobs_to_validate, list_jobs
from database.leases import count_queued, expire_leases
from database.models import Event, File, Job
from database.probes import is_probe_due, take_probe
from database.progress import list_digests, list_events, list_metrics, list_samples
from database.projects import find_api_key
from database.reports import claim_report, is_report_due, list_reports, newest_tests
from database.session import open_database
from tests.database.rows import claim

WHOLE_TABLE = re.compile(r"^SCAN (?!.*USING (COVERING )?INDEX)(?!.*(CONSTANT|SUBQUERY|json_each))")
POLLED = {
    "claim": lambda session: claim(session),
    "count queued": count_queued,
    "expire": lambda session: expire_leases(session, max_attempts=3),
    "validate": lambda session: jobs_to_validate(session, 5),
    "probe due": is_probe_due,
    "take probe": lambda session: take_probe(session, 60.0),
    "jobs": lambda session: list_jobs(session, "proj_a", after=None, limit=5),
    "files": lambda session: list_files(session, "proj_a", purpose="fine-tune", after=None, limit=5),
    "events": lambda session: list_events(session, "ftjob-a", after=None, limit=5),
    "metrics": lambda session: list_metrics(session, "ftjob-a", after=7),
    "digests": lambda session: list_digests(session, "ftjob-a", after=None, limit=5),
    "samples": lambda session: list_samples(session, "ftjob-a", step=3, order="reward"),
    "reports due": is_report_due,
    "claim report": lambda session: claim_report(session, 60.0),
    "reports": lambda session: list_reports(session, "proj_a", "grader_a", kind=None, after=None, limit=5),
    "newest tests": lambda session: newest_tests(session, [("grader_a", 1)]),
    "api key": lambda session: find_api_key(session, "hone-x"),
}


@pytest.fixture
def explained(sqlite_template):
    """(function, list of plan lines): the plans of all that `function` runs."""
    database = open_database(Settings(home=sqlite_template))
    plans = []

    def explain(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            plans.extend(row[3] for row in connection.connection.execute("EXPLAIN QUERY PLAN " + statement, parameters))

    event.listen(database.engine, "before_cursor_execute", explain)
    yield database, plans
    database.close()


@pytest.mark.parametrize("name", POLLED)
def test_polling_reads_an_index(explained, name):
    database, plans = explained
    with database.transaction() as session:
        POLLED[name](session)
    assert plans
    assert [line for line in plans if WHOLE_TABLE.match(line)] == []


def test_a_read_of_a_whole_table_would_be_seen(explained):
    database, plans = explained
    with database.reading() as session:
        for table in (Event.message, Job.worker, File.filename):
            session.execute(select(table).where(table == "x"))
    assert len([line for line in plans if WHOLE_TABLE.match(line)]) == 3
