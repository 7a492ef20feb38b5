"""Brings both sets of tables to a revision: the main ones and the blobs', each with versions and a version table of its own.

One transaction and one lock per database, so two starters at once do no harm and a failed migration leaves nothing half done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, create_engine, event, text

from core.settings import Settings
from database.models import Base, BlobBase

FOLDER = Path(__file__).parent
_ADVISORY_LOCK = 0x486F6E65


@dataclass(frozen=True)
class Branch:
    name: str
    versions: Path
    version_table: str
    metadata: MetaData


MAIN = Branch("main", FOLDER / "versions", "alembic_version", Base.metadata)
BLOBS = Branch("blobs", FOLDER / "blob_versions", "alembic_version_blobs", BlobBase.metadata)
BRANCHES = (MAIN, BLOBS)


def upgrade(settings: Settings, revision: str = "head") -> None:
    for branch in BRANCHES:
        with connected(settings, branch) as connection:
            command.upgrade(make_config(branch, connection), revision)


def downgrade(settings: Settings, revision: str) -> None:
    for branch in BRANCHES:
        with connected(settings, branch) as connection:
            command.downgrade(make_config(branch, connection), revision)


def current(settings: Settings) -> dict[str, str | None]:
    """The revision of each branch; None where nothing is installed."""
    revisions = {}
    for branch in BRANCHES:
        with connected(settings, branch) as connection:
            context = MigrationContext.configure(connection, opts={"version_table": branch.version_table})
            revisions[branch.name] = context.get_current_revision()
    return revisions


@contextmanager
def connected(settings: Settings, branch: Branch) -> Iterator[Connection]:
    """A connection to the branch's database in one locked transaction, committed at the end."""
    url = settings.effective_database_url() if branch is MAIN else settings.effective_blob_database_url()
    is_sqlite = url.startswith("sqlite")
    engine = create_engine(url, connect_args={"timeout": 60} if is_sqlite else {"connect_timeout": 10})
    if is_sqlite:
        Path(engine.url.database or "").parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        event.listen(engine, "connect", _leave_transactions_to_us)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        with engine.begin() as connection:
            if not is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            yield connection
    finally:
        engine.dispose()


def make_config(branch: Branch, connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(branch.versions).replace("%", "%%"))
    config.attributes.update(connection=connection, branch=branch)
    return config


def _leave_transactions_to_us(connection: Any, record: Any) -> None:
    """Else the driver commits before every CREATE TABLE."""
    connection.isolation_level = None
