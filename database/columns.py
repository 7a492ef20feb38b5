"""What every table is made of: the two declarative bases, their column types and names, and text that both databases take."""

import re
from typing import Any

from sqlalchemy import JSON, Dialect, Double, ForeignKey, MetaData, Text, TypeDecorator, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class CleanText(TypeDecorator[str]):
    """Text that both databases take: NUL and half surrogates, which completions may hold, become U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else clean_text(value)


def clean_text(value: str) -> str:
    return _UNSTORABLE.sub("\ufffd", value)


class _Columns(DeclarativeBase):
    __abstract__ = True
    type_annotation_map = {  # noqa: RUF012 - read by DeclarativeBase
        str: CleanText(),
        float: Double(),
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
    }


class Base(_Columns):
    __abstract__ = True
    metadata = MetaData(naming_convention=NAMING)


class BlobBase(_Columns):
    __abstract__ = True
    metadata = MetaData(naming_convention=NAMING)


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


def job_column() -> Mapped[str]:
    return mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
