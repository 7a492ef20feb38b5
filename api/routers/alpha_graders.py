"""The contract's `fine_tuning.alpha.graders`: try a grader on one sample, or only check it."""

from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends

from api.auth import Caller, GraderWriter
from api.bodies import JsonBody, documents, parse_body
from api.grading import check_sources, lacks_json, masked, pin, run_limits, run_once, secrets_of
from api.requests import RunGrader, RunGraderBody, ValidateGrader, ValidateGraderBody
from api.schemas import GraderRun, GraderValidation
from api.services import Services, get_services
from core.specs import parse_grader
from graders.check import check_grader
from graders.run_result import run_result

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"])
HasServices = Annotated[Services, Depends(get_services)]
STRING_CHECK = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
JUDGE = {
    "type": "score_model",
    "name": "taste",
    "base_url": "https://judge.example.com/v1",
    "api_key": "...",
    "model": "judge-large",
    "input": [{"role": "user", "content": "Right: {{item.answer}}. How right is this, from 0 to 1? {{sample.output_text}}"}],
}
PYTHON = {"type": "python", "name": "length", "source": "def grade(sample, item):\n    return min(1.0, len(sample['output_text']) / 100)"}


@router.post("/run", openapi_extra=documents(RunGraderBody, exact={"grader": STRING_CHECK, "model_sample": "4", "item": {"answer": "4"}}))
async def run_grader(body: JsonBody, caller: GraderWriter, services: HasServices) -> GraderRun:
    """Grades one sample. A grader that fails is an answer, not an error: `reward` is null and `metadata.errors` says why."""
    return await to_thread.run_sync(partial(_run, body, caller, services), limiter=services.grader_runs)


@router.post("/validate", openapi_extra=documents(ValidateGraderBody, python={"grader": PYTHON}, judge={"grader": JUDGE}))
async def validate_grader(body: JsonBody, caller: GraderWriter, services: HasServices) -> GraderValidation:
    """The grader as it is understood, secrets masked. Programs are loaded in the sandbox, endpoints and judges are not called."""
    return await to_thread.run_sync(partial(_validate, body, caller, services), limiter=services.grader_runs)


def _run(body: Any, caller: Caller, services: Services) -> GraderRun:
    request = parse_body(RunGrader, body)
    spec = parse_grader(request.grader)
    check_grader(spec, services.network)
    with services.database.reading() as session:
        pinned = pin(session, caller.project_id, spec, "grader")
        secrets = secrets_of(session, services.secrets, pinned)
    grade = run_once(pinned.spec, secrets, services.network, request, run_limits(services.settings, caller.project_id))
    name, no_json = pinned.spec.name or spec.type, lacks_json(pinned.spec, request)
    return GraderRun.model_validate(run_result(grade, name=name, kind=spec.type, lacks_json=no_json))


def _validate(body: Any, caller: Caller, services: Services) -> GraderValidation:
    spec = parse_grader(parse_body(ValidateGrader, body).grader)
    check_grader(spec, services.network)
    with services.database.reading() as session:
        pin(session, caller.project_id, spec, "grader")
    check_sources(spec, "grader")
    return GraderValidation(grader=masked(spec.model_dump(mode="json", exclude_none=True)))
