"""Connections and the only commit: `Database.transaction()`. SQLite and PostgreSQL behave alike behind it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.orm import Session

from core.settings import Settings, blob_database_url

BUSY_TIMEOUT_MS = 10_000
_SQLITE_PRAGMAS = (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "foreign_keys=ON")
_POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 5,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "options": f"-c lock_timeout={BUSY_TIMEOUT_MS} -c statement_timeout=60000 -c idle_in_transaction_session_timeout=60000",
}
"""A frozen client would hold its row locks and a dead server its clients: both are bounded here."""

_WRITES = "hone_writes"


class Database:
    """The engines of one process. Open one, share it between threads, close it at the end."""

    def __init__(self, url: str, blob_url: str | None = None) -> None:
        blob_url = blob_url or blob_database_url(url)
        self.engine = make_engine(url)
        self.blob_engine = self.engine if blob_url == url else make_engine(blob_url, synchronous="FULL")
        """FULL: a row that names a blob must not survive a power cut that the blob did not."""

    def transaction(self) -> AbstractContextManager[Session]:
        """A session that may write; commits at exit, rolls back on an error. No I/O but the database's belongs inside."""
        return writing(self.engine)

    def reading(self) -> AbstractContextManager[Session]:
        """A session that sees one moment on SQLite and never blocks a writer; nothing is committed."""
        return reading(self.engine)

    def close(self) -> None:
        self.engine.dispose()
        self.blob_engine.dispose()


def open_database(settings: Settings) -> Database:
    return Database(settings.effective_database_url(), settings.effective_blob_database_url())


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    options = engine.execution_options(**{_WRITES: True})
    with Session(options, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    with Session(engine, expire_on_commit=False, autoflush=False) as session:
        yield session


def make_engine(url: str, synchronous: Literal["NORMAL", "FULL"] = "NORMAL") -> Engine:
    """An engine whose connections wait for locks, but never for ever."""
    if make_url(url).get_backend_name() == "sqlite":
        return _make_sqlite_engine(url, synchronous)
    return create_engine(url, pool_size=10, max_overflow=20, pool_timeout=30, pool_pre_ping=True, connect_args=_POSTGRESQL_ARGUMENTS)


def _make_sqlite_engine(url: str, synchronous: str) -> Engine:
    database = make_url(url).database
    if not database or database == ":memory:":
        raise ValueError("An SQLite database must be a file: its threads would each see another one in memory.")
    Path(database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(url, pool_size=10, max_overflow=30, pool_timeout=30)
    event.listen(engine, "connect", partial(_prepare_sqlite, synchronous))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(synchronous: str, connection: Any, record: Any) -> None:
    """The driver must not begin transactions by itself: it would begin them for reading and fail to upgrade under load."""
    connection.isolation_level = None
    for pragma in (*_SQLITE_PRAGMAS, f"synchronous={synchronous}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "BEGIN")
