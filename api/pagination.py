"""Cursor pages as the wire contract has them: newest first, `after` is the id of the last item seen."""

from collections.abc import Callable
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

from database.pages import Page

Item = TypeVar("Item", bound=BaseModel)
Row = TypeVar("Row")

After = Annotated[str | None, Query(max_length=256, description="The id of the last item of the page before; unknown ids are refused.")]
Limit = Annotated[int, Query(ge=1, le=100)]
FileLimit = Annotated[int, Query(ge=1, le=10_000)]


class ListPage(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


def list_page(page: Page[Row], view: Callable[[Row], Item]) -> ListPage[Item]:
    """`page` in the contract's words, each row shown by `view`."""
    data = [view(row) for row in page.items]
    ids = [str(getattr(item, "id", "")) for item in data]
    return ListPage(data=data, has_more=page.has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
