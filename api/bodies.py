"""JSON bodies: read raw, so that the specs' own parser names unknown fields, and still documented with their types."""

import json
from typing import Annotated, Any, NoReturn, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from core.errors import InvalidRequest
from core.specs import request_error

Model = TypeVar("Model", bound=BaseModel)
MAX_DEPTH = 64
SCHEMA_REFERENCE = "#/components/schemas/{model}"


async def read_json(request: Request) -> Any:
    """The body as JSON, strictly: UTF-8, no NaN, no NUL and no half of a surrogate pair in any text. Raises: InvalidRequest."""
    data = await request.body()
    if not data:
        raise InvalidRequest("The request needs a JSON body.", code="invalid_json")
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
        _check_texts(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    return value


async def read_json_or_nothing(request: Request) -> Any:
    """As `read_json`; an empty object where there is no body. Raises: InvalidRequest."""
    return await read_json(request) if await request.body() else {}


JsonBody = Annotated[Any, Depends(read_json)]
OptionalJsonBody = Annotated[Any, Depends(read_json_or_nothing)]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_texts(value: Any, depth: int = 0) -> None:
    """Raises: ValueError for a text that no database can store, and for nesting that no serializer would give back."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        if "\x00" in value:
            raise ValueError("a text holds a NUL character")
        value.encode()
    elif isinstance(value, dict):
        for key, member in value.items():
            _check_texts(key, depth + 1)
            _check_texts(member, depth + 1)
    elif isinstance(value, list):
        for member in value:
            _check_texts(member, depth + 1)


def parse_body(model: type[Model], raw: Any) -> Model:
    """Raises: InvalidRequest naming the field and, for an unknown one, the nearest known."""
    if not isinstance(raw, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {type(raw).__name__}.", code="invalid_type")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise request_error(error, model, raw, "") from error


def documents(model: type[BaseModel], **examples: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is a `model`; `api/openapi.py` moves the schema to the components."""
    schema = model.model_json_schema(ref_template=SCHEMA_REFERENCE)
    named = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": named}}}}
