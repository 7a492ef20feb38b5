"""From a request's JSON to a job row. What can be checked without reading the files is checked here, before anything is written."""

from dataclasses import dataclass
from secrets import randbelow
from typing import Any

from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.grading import Pinned, check_sources, masked, pin
from api.services import Services
from core.errors import InvalidRequest, NotFound
from core.grader_specs import GraderSpec
from core.options import Options
from core.presets import resolve_options
from core.specs import JobRequest, parse_grader, parse_job_request
from database.base_models import get_model
from database.files import get_file
from database.jobs import NewJob, insert_job
from database.models import File, Job, Model
from graders.check import check_grader

GRADER = "method.reinforcement.grader"
RESPONSE_FORMAT = "method.reinforcement.response_format"
TRAINING_PURPOSE = "fine-tune"
RESPONSE_FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose own words are right; what they name is looked up in `_insert`."""

    raw: dict[str, Any]
    parsed: JobRequest
    options: Options
    grader: GraderSpec


def submit_job(services: Services, project_id: str, raw: Any) -> Job:
    """The new job, validating. Raises: InvalidRequest naming the field; nothing is written then."""
    request = _check(services, raw)
    with services.database.transaction() as session:
        job = _insert(session, services, project_id, request)
    services.validation_bell.ring()
    return job


def _check(services: Services, raw: Any) -> CheckedRequest:
    parsed = parse_job_request(raw)
    block = parsed.method.reinforcement
    options = resolve_options(block.algorithm, _given(block.hyperparameters))
    _check_response_format(block.response_format)
    grader = parse_grader(block.grader, GRADER)
    check_grader(grader, services.network, GRADER, has_response_format=block.response_format is not None)
    check_sources(grader, GRADER)
    return CheckedRequest(raw, parsed, options, grader)


def _given(hyperparameters: BaseModel) -> dict[str, Any]:
    return hyperparameters.model_dump(exclude_unset=True)


def _insert(session: Session, services: Services, project_id: str, request: CheckedRequest) -> Job:
    parsed = request.parsed
    block = parsed.method.reinforcement
    model = _model(session, project_id, parsed.model)
    training = _file(session, project_id, parsed.training_file, "training_file")
    validation = _file(session, project_id, parsed.validation_file, "validation_file") if parsed.validation_file else None
    pinned = pin(session, project_id, request.grader, GRADER)
    new = NewJob(
        project_id=project_id,
        model=model.name,
        model_digest=model.digest,
        training_file=training.id,
        validation_file=validation.id if validation else None,
        training_blob=training.blob,
        validation_blob=validation.blob if validation else None,
        request=_echo(request.raw),
        algorithm=block.algorithm,
        options=request.options,
        grader=pinned.spec,
        secrets=_sealed(services, pinned),
        response_format=block.response_format,
        seed=parsed.seed if parsed.seed is not None else randbelow(2**31),
        suffix=parsed.suffix,
        metadata=parsed.metadata,
        priority=parsed.priority,
        gpu_class=parsed.resources.gpu_class,
    )
    return insert_job(session, new)


def _model(session: Session, project_id: str, name: str) -> Model:
    try:
        return get_model(session, project_id, name)
    except NotFound as error:
        raise InvalidRequest(error.message, code="model_not_found", param="model") from error


def _file(session: Session, project_id: str, file_id: str, param: str) -> File:
    try:
        file = get_file(session, project_id, file_id)
    except NotFound as error:
        raise InvalidRequest(f"'{param}': {error.message}.", code="file_not_found", param=param) from error
    if file.purpose != TRAINING_PURPOSE:
        message = f"'{param}': {file_id} was uploaded with purpose '{file.purpose}', not '{TRAINING_PURPOSE}'."
        raise InvalidRequest(message, code="invalid_file_purpose", param=param)
    return file


def _check_response_format(response_format: dict[str, Any] | None) -> None:
    if response_format is None:
        return
    kind = response_format.get("type")
    if kind not in RESPONSE_FORMATS:
        raise InvalidRequest(f"'{RESPONSE_FORMAT}.type' must be one of {', '.join(RESPONSE_FORMATS)}.", param=f"{RESPONSE_FORMAT}.type")
    described = response_format.get("json_schema")
    if kind == "json_schema" and not (isinstance(described, dict) and isinstance(described.get("schema"), dict)):
        message = f"'{RESPONSE_FORMAT}.json_schema' must hold a 'schema' object."
        raise InvalidRequest(message, code="missing_required_parameter", param=f"{RESPONSE_FORMAT}.json_schema.schema")


def _sealed(services: Services, pinned: Pinned) -> str | None:
    return services.secrets.encrypt(pinned.inline_secrets) if pinned.inline_secrets else None


def _echo(raw: dict[str, Any]) -> dict[str, Any]:
    """The request as it is stored and shown: header values masked."""
    method = raw["method"]
    block = method["reinforcement"]
    return {**raw, "method": {**method, "reinforcement": {**block, "grader": masked(block["grader"])}}}
