"""What a job asks for: the create request in the wire contract's words plus ours, parsed strictly.

Read `core/options.py` for the options and `core/presets.py` for how an algorithm's name becomes options.
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, field_validator

from core.errors import InvalidRequest
from core.grader_specs import (
    GRADER_TYPES,
    GraderSpec,
    InlineEndpointGrader,
    LabelModelGrader,
    MultiGrader,
    PythonGrader,
    RegisteredEndpointGrader,
    RewardModelGrader,
    ScoreModelGrader,
    StringCheckGrader,
    TextSimilarityGrader,
    named_graders,
)
from core.options import Hyperparameters

Suffix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ReinforcementMethod(_Strict):
    grader: dict[str, Any]
    """Parsed by `parse_grader`, so that an error names the grader's own field."""
    algorithm: str = "grpo"
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)  # type: ignore[valid-type]
    response_format: dict[str, Any] | None = None


class Method(_Strict):
    type: Literal["reinforcement"]
    reinforcement: ReinforcementMethod


class Resources(_Strict):
    gpu_class: Annotated[str, Field(min_length=1, max_length=64)] = "any"
    gpus: Annotated[int, Field(ge=1, le=1)] = 1


class JobRequest(_Strict):
    """The body of POST /v1/fine_tuning/jobs."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: Annotated[str, Field(min_length=1, max_length=128)]
    validation_file: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    method: Method
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    resources: Resources = Resources()

    @field_validator("resources", mode="before")
    @classmethod
    def _default_resources(cls, value: Any) -> Any:
        return value if value is not None else Resources()


_KINDS: dict[str, Any] = {
    "label_model": LabelModelGrader,
    "multi": MultiGrader,
    "python": PythonGrader,
    "reward_model": RewardModelGrader,
    "score_model": ScoreModelGrader,
    "string_check": StringCheckGrader,
    "text_similarity": TextSimilarityGrader,
}
_SECRETS = frozenset({"headers", "api_key"})


def parse_grader(raw: Any, param: str = "grader") -> GraderSpec:
    """The grader that `raw` describes. Raises: InvalidRequest naming the field below `param`."""
    if not isinstance(raw, dict):
        raise InvalidRequest(f"'{param}' must be an object, not {type(raw).__name__}.", code="invalid_type", param=param)
    kind = raw.get("type")
    if kind == "endpoint":
        model: Any = RegisteredEndpointGrader if "grader_id" in raw else InlineEndpointGrader
    elif isinstance(kind, str) and kind in _KINDS:
        model = _KINDS[kind]
    else:
        came = repr(kind) if kind is None or isinstance(kind, str) else f"a {type(kind).__name__}"
        raise InvalidRequest(f"'{param}.type' is {came}; this server has {', '.join(GRADER_TYPES)}.", param=f"{param}.type")
    if kind == "multi":
        raw = {**raw, "graders": _parse_members(raw.get("graders"), param)}
    try:
        return cast(GraderSpec, model.model_validate(raw))
    except ValidationError as error:
        raise request_error(error, model, raw, param) from error


def _parse_members(raw: Any, param: str) -> Any:
    """The members of a multi grader, each parsed by itself so that its errors are exact; a wrong container is left to the model."""
    try:
        members = named_graders(raw)
    except ValueError:
        return raw
    if not isinstance(members, dict):
        return raw
    for name, member in members.items():
        if isinstance(member, dict) and member.get("type") == "multi":
            raise InvalidRequest("A 'multi' grader cannot contain another one.", param=f"{param}.graders.{name}.type")
    return {name: parse_grader(member, f"{param}.graders.{name}") for name, member in members.items()}


def parse_job_request(raw: Any) -> JobRequest:
    """Raises: InvalidRequest naming the field, what came and, for an unknown field, the nearest known one."""
    if not isinstance(raw, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {type(raw).__name__}.", code="invalid_type")
    try:
        return JobRequest.model_validate(raw)
    except ValidationError as error:
        raise request_error(error, JobRequest, raw, "") from error


def request_error(error: ValidationError, model: type[BaseModel], raw: Any, prefix: str) -> InvalidRequest:
    """The first error of `error` in the API's words. What came in place of a secret, or around one, is not repeated.

    Of a field that takes text or a list, it is the list's error where a list came.
    """
    errors = error.errors(include_url=False, include_context=False)
    path = _path_in(raw, errors[0]["loc"])
    alike = [detail for detail in errors if isinstance(errors[0].get("input"), list) and _path_in(raw, detail["loc"]) == path]
    first = next((detail for detail in alike if not detail["type"].endswith("_type")), errors[0])
    param = ".".join([prefix, *path] if prefix else path) or None
    if first["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    if first["type"] == "extra_forbidden":
        near = get_close_matches(path[-1], _known_names(model, path[:-1]), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return InvalidRequest(f"Unknown parameter: '{param}'.{hint}", code="unknown_parameter", param=param)
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    came = "" if _SECRETS & set(path) or isinstance(first.get("input"), dict | list) else f"; got {_shorten(first.get('input'))}"
    return InvalidRequest(f"'{param}': {first['msg'].removeprefix('Value error, ')}{came}.", code=code, param=param)


def _path_in(raw: Any, location: tuple[int | str, ...]) -> list[str]:
    """`location` as far as it lies in `raw` and one part beyond: pydantic adds the names of union members, which no field has."""
    path: list[str] = []
    for part in location:
        if isinstance(raw, dict) and part not in raw and part == raw.get("type"):
            continue
        path.append(str(part))
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return path if isinstance(raw, dict) else path[:-1]
    return path


def _known_names(model: Any, path: list[str]) -> list[str]:
    """Field names of the model that lies at `path` below `model`, as far as the path goes through plain models."""
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        inner = field.annotation if field else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return list(model.model_fields)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


GRADER_ADAPTER: TypeAdapter[GraderSpec] = TypeAdapter(GraderSpec)
