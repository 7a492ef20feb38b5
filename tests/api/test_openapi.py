"""The OpenAPI document: every body and answer has its type, and the examples are requests that the API takes."""

import re
from typing import Any

import pytest

from api.app import create_app
from api.requests import CreateApiKey, CreateGrader, CreateModel, ProbeGrader, RegradeJob, UpdateGrader
from core.specs import parse_grader, parse_job_request

DOCUMENT = create_app().openapi()
OPERATIONS = [
    (f"{method.upper()} {path}", operation) for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
]
MODELS: dict[str, Any] = {
    "POST /v1/graders": CreateGrader,
    "POST /v1/graders/{grader_id}": UpdateGrader,
    "POST /v1/graders/{grader_id}/test": ProbeGrader,
    "POST /v1/graders/{grader_id}/regrade": RegradeJob,
    "POST /v1/models": CreateModel,
    "POST /v1/admin/api_keys": CreateApiKey,
}


@pytest.mark.parametrize(("name", "operation"), OPERATIONS, ids=[name for name, _ in OPERATIONS])
def test_operation_is_described_typed_and_has_its_errors(name: str, operation: dict[str, Any]) -> None:
    assert operation["description"] or operation["summary"]
    success = operation["responses"].get("200") or operation["responses"]["202"]
    content = success["content"] if not name.endswith("/content") else {}
    assert all("$ref" in media["schema"] for media in content.values())
    if "security" in operation:
        assert {"400", "401", "403", "404"} <= operation["responses"].keys()
    assert "422" not in operation["responses"]


def test_every_reference_has_its_schema() -> None:
    references = set(re.findall(r"#/components/schemas/([^'\"]+)", str(DOCUMENT)))
    assert references <= DOCUMENT["components"]["schemas"].keys()


def test_job_body_spells_out_options_and_graders() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    body = DOCUMENT["paths"]["/v1/fine_tuning/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "training_file" in schemas[body["$ref"].rsplit("/", 1)[1]]["required"]
    assert {"group_size", "kl_coefficient", "n_epochs"} <= schemas["Hyperparameters"]["properties"].keys()
    assert {"StringCheckGrader", "PythonGrader", "InlineEndpointGrader", "RegisteredEndpointGrader", "MultiGrader"} <= schemas.keys()


@pytest.mark.parametrize(("name", "operation"), [pair for pair in OPERATIONS if "application/json" in str(pair[1].get("requestBody"))])
def test_examples_are_requests_that_the_api_takes(name: str, operation: dict[str, Any]) -> None:
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    assert examples
    for example in examples.values():
        if name in MODELS:
            MODELS[name].model_validate(example["value"])
        elif "grader" in example["value"]:
            parse_grader(example["value"]["grader"])
        else:
            parse_grader(parse_job_request(example["value"]).method.reinforcement.grader)
