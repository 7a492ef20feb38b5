import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from core.settings import Settings
from migrations.run import BLOBS, BRANCHES, MAIN, connected, current, downgrade, upgrade
from tests.servers import start_postgres


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def empty_settings(request, tmp_path_factory):
    """Settings of a database without tables, not shared with other tests."""
    home = tmp_path_factory.mktemp("migrations")
    if request.param == "sqlite":
        yield Settings(home=home)
        return
    with start_postgres() as url:
        yield Settings(home=home, database_url=url)


def differences(settings, branch):
    """What autogenerate would write to make the tables equal to the models."""
    others = {table for other in BRANCHES if other is not branch for table in other.metadata.tables}
    ours = {"include_name": lambda name, kind, parents: kind != "table" or name not in others | {other.version_table for other in BRANCHES}}
    with connected(settings, branch) as connection:
        context = MigrationContext.configure(connection, opts={"target_metadata": branch.metadata, **ours})
        return compare_metadata(context, branch.metadata)


def tables(settings):
    found = set()
    for branch in BRANCHES:
        with connected(settings, branch) as connection:
            found |= set(inspect(connection).get_table_names())
    return found - {branch.version_table for branch in BRANCHES}


def test_up_down_up_ends_equal_to_the_models(empty_settings):
    upgrade(empty_settings)
    assert differences(empty_settings, MAIN) == []
    assert differences(empty_settings, BLOBS) == []
    downgrade(empty_settings, "base")
    assert tables(empty_settings) == set()
    assert current(empty_settings) == {"main": None, "blobs": None}
    upgrade(empty_settings)
    assert differences(empty_settings, MAIN) == []
    assert differences(empty_settings, BLOBS) == []
    assert tables(empty_settings) == set(MAIN.metadata.tables) | set(BLOBS.metadata.tables)


def test_a_changed_table_is_seen_as_a_difference(empty_settings):
    upgrade(empty_settings)
    with connected(empty_settings, MAIN) as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN stray INTEGER"))
    assert [change[0] for change in differences(empty_settings, MAIN)] == ["remove_column"]
    with connected(empty_settings, MAIN) as connection:
        connection.execute(text("ALTER TABLE jobs DROP COLUMN stray"))


def test_upgrade_of_an_up_to_date_database_keeps_its_rows(empty_settings):
    upgrade(empty_settings)
    with connected(empty_settings, MAIN) as connection:
        connection.execute(text("INSERT INTO projects (id, name, created_at) VALUES ('proj_a', 'a', 0)"))
    upgrade(empty_settings)
    with connected(empty_settings, MAIN) as connection:
        assert connection.execute(text("SELECT id FROM projects")).scalars().all() == ["proj_a"]
        connection.execute(text("DELETE FROM projects"))


def test_chunk_bytes_are_stored_external_on_postgresql(postgres_url):
    with connected(Settings(database_url=postgres_url), BLOBS) as connection:
        query = "SELECT attstorage FROM pg_attribute WHERE attrelid = 'blob_chunks'::regclass AND attname = 'data'"
        assert connection.execute(text(query)).scalar_one() in ("e", b"e")


def test_the_command_line_upgrades_the_home_that_the_environment_names(tmp_path):
    """A process of its own: the entry point is what is under test."""
    environment = {"HONE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "migrations", "upgrade"]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["main: 0003", "blobs: 0001"], result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"hone.db", "blobs.db"}
