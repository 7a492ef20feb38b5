"""What every query file shares: the database's clock, ids, inserts that return the row, pages. Commits nothing."""

import secrets
import string
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Double, Select, Update, and_, insert, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session
from sqlalchemy.sql.functions import FunctionElement

from core.errors import InvalidRequest
from database.pages import Page

Row = TypeVar("Row", bound=DeclarativeBase)
_ALPHABET = string.ascii_lowercase + string.digits
RANDOM_CHARACTERS = 12


class clock(FunctionElement[float]):
    """Seconds since 1970 by the database's own clock: the only clock that leases know."""

    type = Double()
    inherit_cache = True
    name = "clock"


@compiles(clock, "sqlite")
def _clock_of_sqlite(element: clock, compiler: Any, **options: Any) -> str:
    """unixepoch('subsec') would be shorter, but is a silent NULL before SQLite 3.42."""
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(clock, "postgresql")
def _clock_of_postgresql(element: clock, compiler: Any, **options: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)"


def now(session: Session) -> float:
    return float(session.execute(select(clock())).scalar_one())


def is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def new_id(prefix: str) -> str:
    """`prefix`, the time in hex (so that ids made in the same millisecond still sort by age) and 62 random bits."""
    return f"{prefix}{time.time_ns():016x}" + "".join(secrets.choice(_ALPHABET) for _ in range(RANDOM_CHARACTERS))


def insert_row(session: Session, table: type[Row], **values: Any) -> Row:
    """The new row with everything that the database filled in."""
    return session.execute(insert(table).values(**values).returning(table)).scalar_one()


def insert_or_skip(session: Session, table: type[Row], **values: Any) -> Row | None:
    """The new row, or None when it would break a unique index."""
    statement = _dialect_insert(session, table).values(**values).on_conflict_do_nothing().returning(table)
    return session.execute(statement).scalar_one_or_none()


def update_row(session: Session, statement: Update, table: type[Row]) -> Row | None:
    """The row after `statement`, or None when its WHERE let none through."""
    options = {"synchronize_session": False, "populate_existing": True}
    return session.execute(statement.returning(table), execution_options=options).scalar_one_or_none()


def upsert_rows(session: Session, table: type[Row], rows: Sequence[dict[str, Any]]) -> None:
    """Writes `rows` over those with the same primary key. No two of `rows` may have the same key."""
    if not rows:
        return
    statement = _dialect_insert(session, table)
    keys = [column.name for column in table.__table__.primary_key]
    changed = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    session.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed), list(rows))


def _dialect_insert(session: Session, table: type[Row]) -> Any:
    return sqlite.insert(table) if is_sqlite(session) else postgresql.insert(table)


def fetch_page(
    session: Session,
    query: Select[Row],
    order: Sequence[InstrumentedAttribute[Any]],
    *,
    after: str | int | None,
    limit: int,
    id_column: InstrumentedAttribute[Any],
    descending: bool = True,
) -> Page[Row]:
    """`limit` rows of `query` in `order`, from behind the row whose id is `after`.

    Raises: InvalidRequest when `query` has no row `after`.
    """
    if after is not None:
        start = session.execute(query.where(id_column == after)).scalar_one_or_none()
        if start is None:
            raise InvalidRequest(f"There is no object '{after}' in this list to go on after.", param="after")
        query = query.where(_behind(order, [getattr(start, column.key) for column in order], descending))
    query = query.order_by(*(column.desc() if descending else column.asc() for column in order)).limit(limit + 1)
    rows = list(session.execute(query).scalars())
    return Page(rows[:limit], len(rows) > limit)


def _behind(order: Sequence[InstrumentedAttribute[Any]], values: list[Any], descending: bool) -> ColumnElement[bool]:
    """The row comparison (a, b) < (x, y), spelt so that both databases start at the right place of an index."""
    column, value = order[0], values[0]
    beyond: ColumnElement[bool] = column < value if descending else column > value
    if len(order) == 1:
        return beyond
    reached: ColumnElement[bool] = column <= value if descending else column >= value
    return and_(reached, or_(beyond, _behind(order[1:], values[1:], descending)))
