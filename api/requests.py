"""The bodies that the API takes beside a job (core/specs.py) and a grader inside one (core/grader_specs.py)."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator

from core.grader_specs import EndpointOptions, GraderSpec, Name
from core.specs import JobRequest, Method, ReinforcementMethod

Scope = Literal["jobs:write", "jobs:read", "graders:write", "models:read", "admin"]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,255}$")]
Headers = Annotated[dict[str, str], Field(max_length=32)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CreateGrader(EndpointOptions):
    """An endpoint to register. Header values are stored encrypted and never shown again."""

    name: Name
    headers: Headers = Field(default_factory=dict)


class UpdateGrader(EndpointOptions):
    """What is given replaces the newest version's value in a new version; `headers` replaces all of them."""

    name: Name | None = None
    url: Annotated[str, Field(min_length=8, max_length=2048, pattern=r"^https?://")] | None = None  # type: ignore[assignment]
    headers: Headers | None = None

    @field_validator("batch_size")
    @classmethod
    def _needs_batches(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Whether it fits says the format of the new version, which may not be given here."""
        return value


Version = Annotated[int, Field(ge=1, le=2**31 - 1)]


class ProbeGrader(_Strict):
    version: Version | None = None
    """None: the newest."""
    file_id: Annotated[str, Field(max_length=256)] | None = None
    """Rows of your own to ask with; the first 20 are used. None: one that is built in."""


class RegradeJob(_Strict):
    job_id: Annotated[str, Field(max_length=256)]
    """Whose samples are scored again."""
    version: Version | None = None
    """Of the grader that the address names. None: the newest."""
    step: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    phase: Literal["train", "valid"] | None = None
    max_samples: Annotated[int, Field(ge=1, le=1000)] = 200
    """Where the job has more, they are taken evenly spread over it."""


class FolderSource(_Strict):
    type: Literal["folder"]
    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^/")]
    """Absolute path of a Hugging Face folder, on the workers."""


class GgufSource(_Strict):
    type: Literal["gguf"]
    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^/.*\.gguf$")]
    """Absolute path of the file, on the workers."""


class HubSource(_Strict):
    type: Literal["hub"]
    repo: Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """A commit, not a branch: what the name stands for must not move."""


class CreateModel(_Strict):
    name: ModelName
    source: Annotated[FolderSource | GgufSource | HubSource, Field(discriminator="type")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 over the converted folder, where it is known; workers then refuse other content."""


class CreateApiKey(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=8)]


class ValidateGrader(_Strict):
    grader: dict[str, Any]


class RunGrader(_Strict):
    grader: dict[str, Any]
    model_sample: Annotated[str, Field(max_length=1_000_000)]
    item: dict[str, Any] | None = None
    reference_answer: Any = None
    """The API's first form of `item`: reachable as `item.reference_answer`."""


class ValidateGraderBody(BaseModel):
    """For the OpenAPI document only: the grader with its types spelled out."""

    grader: GraderSpec


class RunGraderBody(ValidateGraderBody):
    model_sample: str
    item: dict[str, Any] | None = None
    reference_answer: Any = None


class ReinforcementBody(ReinforcementMethod):
    grader: GraderSpec  # type: ignore[assignment]


class MethodBody(Method):
    reinforcement: ReinforcementBody


class CreateJobBody(JobRequest):
    method: MethodBody
