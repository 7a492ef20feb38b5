"""The OpenAPI document: FastAPI's own, with the bodies that are parsed raw given their types, and the one error body on every route."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.bodies import SCHEMA_REFERENCE
from api.schemas import ErrorBody

DESCRIPTION = """Reinforcement fine-tuning behind the OpenAI fine-tuning API.

Every error has the same body (`ErrorBody`); `code` is stable and listed in docs/errors.md."""
ERRORS = {
    "400": "The request is malformed or asks for what is not allowed; `error.param` names the field.",
    "401": "The API key is missing or not valid.",
    "403": "The key lacks the scope.",
    "404": "No such object in this project.",
}


def install_openapi(app: FastAPI) -> None:
    """Makes `app.openapi()` build the document once, on first use."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    schemas = document["components"]["schemas"]
    _move(ErrorBody.model_json_schema(ref_template=SCHEMA_REFERENCE), schemas)
    for path in document["paths"].values():
        for operation in path.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                content["schema"] = _move(content["schema"], schemas)
            _add_errors(operation)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document


def _move(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference to `schema`, which now lies among the document's `schemas` with everything that it refers to."""
    if "title" not in schema:
        return schema
    schemas.update(schema.pop("$defs", {}))
    schemas[schema["title"]] = schema
    return {"$ref": SCHEMA_REFERENCE.format(model=schema["title"])}


def _add_errors(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if "security" not in operation:
        return
    content = {"application/json": {"schema": {"$ref": SCHEMA_REFERENCE.format(model="ErrorBody")}}}
    for status, description in ERRORS.items():
        responses.setdefault(status, {"description": description, "content": content})
