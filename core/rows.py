"""One row of a training file: the chat messages and everything else, which graders see as `item`. Used by validation and by the trainer."""

import json
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import InvalidRequest


class Message(BaseModel):
    """One chat message; `developer` is passed to templates as `system`."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = Field(max_length=4_000_000)


class Row(BaseModel):
    """`messages` is reserved, every other key of the line is free and reachable as `{{item.key}}`."""

    model_config = ConfigDict(extra="allow", strict=True)

    messages: list[Message] = Field(min_length=1)

    @property
    def item(self) -> dict[str, Any]:
        """The dataset row as the grader sees it: every key of the line, `messages` included."""
        return self.model_dump()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def parse_row(line: bytes, number: int, param: str) -> Row:
    """The row on line `number` of the file that the job calls `param` (training_file or validation_file).

    Raises: InvalidRequest with code `invalid_<param>` naming the line.
    """
    code = f"invalid_{param}"
    try:
        raw = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"Line {number} is not JSON: {error}.", code=code, param=param) from error
    if not isinstance(raw, dict):
        raise InvalidRequest(f"Line {number} must be a JSON object, not {type(raw).__name__}.", code=code, param=param)
    try:
        row = Row.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"Line {number}, '{where}': {first['msg']}.", code=code, param=param) from error
    last = row.messages[-1]
    if last.role != "user":
        raise InvalidRequest(f"Line {number}: the last message must be from 'user', not '{last.role}'.", code=code, param=param)
    if not last.content.strip():
        raise InvalidRequest(f"Line {number}: the prompt is empty.", code=code, param=param)
    return row
