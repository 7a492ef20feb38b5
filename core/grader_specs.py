"""The graders that a request may name, as the wire contract spells them, and the form in which a job pins them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_SOURCE_BYTES = 256_000
Name = Annotated[str, Field(min_length=1, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StringCheckGrader(_Strict):
    """1 when `input` stands in the relation `operation` to `reference`, else 0. Both are templates."""

    type: Literal["string_check"]
    name: Name | None = None
    input: str
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"]

    @field_validator("operation", mode="before")
    @classmethod
    def _explain_neq(cls, value: Any) -> Any:
        if value == "neq":
            raise ValueError("'neq' is spelt 'ne'")
        return value


class PythonGrader(_Strict):
    """A program that defines `grade(sample, item) -> float`, run in the sandbox."""

    type: Literal["python"]
    name: Name | None = None
    source: Annotated[str, Field(min_length=1, max_length=MAX_SOURCE_BYTES)]
    image_tag: str | None = None
    """Accepted for compatibility; the sandbox has one image."""


class EndpointOptions(_Strict):
    """How an HTTP grader is called; the same fields inline in a job and in a registered grader."""

    url: Annotated[str, Field(min_length=8, max_length=2048, pattern=r"^https?://")]
    format: Literal["single"] = "single"
    timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 60.0
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    rate_limit: Annotated[float, Field(gt=0)] | None = None
    """Requests per second."""
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 5
    reward_range: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """A score outside is an error, not clipped."""
    pass_threshold: float | None = None
    """For reports; no effect on the reward."""

    @field_validator("reward_range")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"the lower bound {bounds[0]} must be below the upper bound {bounds[1]}")
        return bounds


class InlineEndpointGrader(EndpointOptions):
    """An endpoint given in the job itself. Its headers are secrets: stored encrypted, shown masked."""

    type: Literal["endpoint"]
    name: Name | None = None
    headers: dict[str, str] = Field(default_factory=dict, max_length=32)


class RegisteredEndpointGrader(_Strict):
    """An endpoint registered under `/v1/graders`; the job pins the version current at submit."""

    type: Literal["endpoint"]
    name: Name | None = None
    grader_id: Annotated[str, Field(pattern=r"^grader_[A-Za-z0-9]+$")]


class PinnedEndpointGrader(EndpointOptions):
    """What a job stores and the trainer reads in place of either form above: everything but the secrets."""

    type: Literal["endpoint"]
    name: Name | None = None
    secret_ref: str
    """Key into the secrets that reach the trainer by pipe: {secret_ref: {"headers": {...}, "signing_secret": str | null}}."""
    grader_version: str
    """`grader_abc@3` for a registered grader, `inline` otherwise; part of every sample and idempotency key."""


SingleGrader = StringCheckGrader | PythonGrader | InlineEndpointGrader | RegisteredEndpointGrader
PinnedSingleGrader = StringCheckGrader | PythonGrader | PinnedEndpointGrader


class MultiGrader(_Strict):
    """A formula over the grades of others. `graders` may be sent as a dict, a list (names are the keys) or one grader."""

    type: Literal["multi"]
    name: Name | None = None
    graders: dict[str, SingleGrader] = Field(min_length=1, max_length=32)
    calculate_output: Annotated[str, Field(min_length=1, max_length=4096)]

    @field_validator("graders", mode="before")
    @classmethod
    def _as_dict(cls, value: Any) -> Any:
        return named_graders(value)


class PinnedMultiGrader(_Strict):
    type: Literal["multi"]
    name: Name | None = None
    graders: dict[str, PinnedSingleGrader] = Field(min_length=1)
    calculate_output: str


GraderSpec = StringCheckGrader | PythonGrader | InlineEndpointGrader | RegisteredEndpointGrader | MultiGrader
PinnedGraderSpec = StringCheckGrader | PythonGrader | PinnedEndpointGrader | PinnedMultiGrader

GRADER_TYPES = ("endpoint", "multi", "python", "string_check")


def named_graders(value: Any) -> Any:
    """`multi.graders` as a dict: from a dict, a list whose items have names, or one grader."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        value = [value]
    if not isinstance(value, list):
        return value
    names = [item.get("name") if isinstance(item, dict) else None for item in value]
    if any(name is None for name in names):
        raise ValueError("graders given as a list need a 'name' each")
    if len(set(names)) != len(names):
        raise ValueError("graders given as a list need names that differ")
    return dict(zip(names, value, strict=True))
