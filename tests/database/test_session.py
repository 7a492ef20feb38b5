import time

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from core.errors import NotFound
from core.settings import Settings
from database.models import Project
from database.projects import create_project, get_project
from database.session import Database
from database.sql import clock, insert_row, now
from tests.database.rows import in_threads, make_project


def count_projects(database):
    with database.reading() as session:
        return len(session.execute(select(Project)).scalars().all())


def test_transaction_commits_at_exit_and_rolls_back_on_an_error(database):
    with database.transaction() as session:
        make_project(session)

    def write_and_fail():
        with database.transaction() as session:
            make_project(session)
            get_project(session, "proj_no")

    with pytest.raises(NotFound):
        write_and_fail()
    assert count_projects(database) == 1


def test_reading_commits_nothing(database):
    with database.reading() as session:
        make_project(session)
    assert count_projects(database) == 0


def test_clock_is_a_number_close_to_the_real_time(database):
    """Guards the silent NULL that unixepoch('subsec') is on an older SQLite."""
    with database.reading() as session:
        assert abs(now(session) - time.time()) < 5


def test_read_then_write_in_many_threads_loses_no_update_and_never_fails_on_a_lock(database):
    """Plain BEGIN would fail here with "database is locked": two readers cannot both upgrade."""
    with database.transaction() as session:
        insert_row(session, Project, id="proj_counter", name="0", created_at=clock())

    def count_up():
        for _ in range(10):
            with database.transaction() as session:
                project = session.execute(select(Project).where(Project.id == "proj_counter").with_for_update()).scalar_one()
                project.name = str(int(project.name) + 1)

    in_threads([count_up] * 4)
    with database.reading() as session:
        assert session.get(Project, "proj_counter").name == "40"


def test_a_reader_is_not_blocked_by_an_open_writer(database):
    with database.transaction() as session:
        make_project(session)
        assert count_projects(database) == 0


def test_foreign_keys_hold(database):
    with pytest.raises(DBAPIError), database.transaction() as session:
        session.execute(
            text("INSERT INTO api_keys (id, project_id, name, key_hash, hint, scopes, created_at) VALUES ('k','no','n','h','h','[]',0)")
        )


def test_text_that_a_database_cannot_hold_is_stored_readable(database):
    with database.transaction() as session:
        project_id = create_project(session, "a\x00b\ud800c").id
    with database.reading() as session:
        assert session.get(Project, project_id).name == "a\ufffdb\ufffdc"


def test_sqlite_has_wal_foreign_keys_and_a_full_sync_for_blobs_alone(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/hone.db")
    read = lambda engine, pragma: engine.connect().execute(text(f"PRAGMA {pragma}")).scalar_one()  # noqa: E731
    assert [read(database.engine, name) for name in ("journal_mode", "synchronous", "foreign_keys")] == ["wal", 1, 1]
    assert [read(database.blob_engine, name) for name in ("journal_mode", "synchronous")] == ["wal", 2]
    assert {path.name for path in tmp_path.glob("*.db")} == {"hone.db", "blobs.db"}
    database.close()


def test_postgresql_bounds_every_wait(postgres_url):
    database = Database(postgres_url)
    with database.reading() as session:
        shown = {name: session.execute(text(f"SHOW {name}")).scalar_one() for name in ("lock_timeout", "statement_timeout")}
        shown["idle"] = session.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one()
    database.close()
    assert shown == {"lock_timeout": "10s", "statement_timeout": "1min", "idle": "1min"}


def test_sqlite_in_memory_is_refused():
    with pytest.raises(ValueError, match="must be a file"):
        Database("sqlite://", "sqlite://")


def test_blobs_lie_beside_the_main_sqlite_file_or_in_the_same_postgresql(tmp_path):
    assert Settings(home=tmp_path).effective_blob_database_url() == f"sqlite:///{tmp_path}/blobs.db"
    assert Settings(database_url="sqlite:////a/b.db?x=1").effective_blob_database_url() == "sqlite:////a/blobs.db?x=1"
    assert Settings(database_url="postgresql://h/d").effective_blob_database_url() == "postgresql://h/d"
