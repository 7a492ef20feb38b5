"""Databases and servers for every room. `settings` and `database` come empty and migrated, once on SQLite and once on PostgreSQL."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete

from core.settings import Settings
from database.models import Base, BlobBase
from database.session import Database, open_database, writing
from migrations.run import upgrade
from tests.servers import start_postgres, start_redis, start_valkey


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with start_redis() as url:
        yield url


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with start_valkey() as url:
        yield url


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A migrated database, shared by the session: `settings` empties it."""
    with start_postgres() as url:
        upgrade(Settings(database_url=url))
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sqlite")
    upgrade(Settings(home=folder))
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A home of its own and an empty database."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("sqlite_template")
        for name in ("hone.db", "blobs.db"):
            shutil.copy(template / name, home / name)
        return Settings(home=home)
    settings = Settings(home=home, database_url=request.getfixturevalue("postgres_url"))
    database = open_database(settings)
    empty_tables(database)
    database.close()
    return settings


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    opened = open_database(settings)
    yield opened
    opened.close()


def empty_tables(database: Database) -> None:
    for engine, metadata in ((database.engine, Base.metadata), (database.blob_engine, BlobBase.metadata)):
        with writing(engine) as session:
            for table in reversed(metadata.sorted_tables):
                session.execute(delete(table))
