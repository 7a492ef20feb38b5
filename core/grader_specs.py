"""The graders that a request may name, as the wire contract spells them, and the form in which a job pins them."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from core.judge_specs import JudgeMessage, SamplingParams

MAX_SOURCE_BYTES = 256_000
UNSUPPORTED_METRICS = {
    "cosine": "'cosine' compares embeddings and is for evals, not for fine-tuning; use 'rouge_l', or an endpoint of your own",
    "meteor": "'meteor' needs WordNet's synonyms, which this server does not have; use 'gleu' or 'rouge_l'",
}


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError(f"the lower bound {bounds[0]} must be below the upper bound {bounds[1]}")
    return bounds


Name = Annotated[str, Field(min_length=1, max_length=64)]
Label = Annotated[str, Field(min_length=1, max_length=256)]
ApiKey = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[\x21-\x7e]+$")]
"""A secret: stored encrypted, shown masked."""
Bounds = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ordered)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Thresholded(_Strict):
    """A grader whose reward reports may call passed or not."""

    pass_threshold: float | None = None
    """For reports; no effect on the reward."""

    @property
    def best_reward(self) -> float:
        return 1.0


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


class TextSimilarityGrader(Thresholded):
    """How much `input` is like `reference`, from 0 to 1. Both are templates."""

    type: Literal["text_similarity"]
    name: Name | None = None
    input: str
    reference: str
    evaluation_metric: Literal["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]

    @field_validator("evaluation_metric", mode="before")
    @classmethod
    def _explain_missing(cls, value: Any) -> Any:
        if isinstance(value, str) and value in UNSUPPORTED_METRICS:
            raise ValueError(UNSUPPORTED_METRICS[value])
        return value


class PythonGrader(_Strict):
    """A program that defines `grade(sample, item) -> float`, run in the sandbox."""

    type: Literal["python"]
    name: Name | None = None
    source: Annotated[str, Field(min_length=1, max_length=MAX_SOURCE_BYTES)]
    interpreter: Literal["auto", "cpython"] = "auto"
    """`auto`: a fast one that has a subset of Python, and all of Python for a program that needs more. `cpython`: always all of it."""
    image_tag: str | None = None
    """Accepted for compatibility; the sandbox has one image."""


class CallOptions(Thresholded):
    """How often and how long a service behind a URL is called."""

    timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 60.0
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    rate_limit: Annotated[float, Field(gt=0)] | None = None
    """Requests per second."""
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 5


class EndpointOptions(CallOptions):
    """How an HTTP grader is called; the same fields inline in a job and in a registered grader."""

    url: Annotated[str, Field(min_length=8, max_length=2048, pattern=r"^https?://")]
    format: Literal["single", "batch", "openrlhf"] = "single"
    batch_size: Annotated[int, Field(ge=1, le=256)] | None = None
    """Most completions in one call of the formats `batch` and `openrlhf`. None: 16."""
    hedge: bool = False
    """A call that is slower than 95 % of those before is sent a second time; the first valid answer counts."""
    reward_range: Bounds | None = None
    """A score outside is an error, not clipped."""

    @field_validator("batch_size")
    @classmethod
    def _needs_batches(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("format") == "single":
            raise ValueError("'batch_size' needs 'format' to be 'batch' or 'openrlhf'")
        return value

    @property
    def best_reward(self) -> float:
        return self.reward_range[1] if self.reward_range else 1.0


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


class JudgeOptions(CallOptions):
    """A language model that grades, behind an OpenAI-compatible API."""

    name: Name | None = None
    base_url: Annotated[str, Field(min_length=8, max_length=2048, pattern=r"^https?://[^?#]+$")]
    """As the `openai` client takes it: what stands before `/chat/completions`."""
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[list[JudgeMessage], Field(min_length=1, max_length=64)]
    sampling_params: SamplingParams = SamplingParams()

    @field_validator("base_url")
    @classmethod
    def _without_route(cls, value: str) -> str:
        if value.rstrip("/").endswith("/chat/completions"):
            raise ValueError("leave out '/chat/completions'; it is added to every call")
        return value


class ScoreModelOptions(JudgeOptions):
    """A judge that gives a number."""

    type: Literal["score_model"]
    range: Bounds = (0.0, 1.0)
    """A number outside is an error, not clipped."""

    @property
    def best_reward(self) -> float:
        return self.range[1]


class LabelModelOptions(JudgeOptions):
    """A judge that gives one of `labels`: 1 when it is in `passing_labels`, else 0."""

    type: Literal["label_model"]
    labels: Annotated[list[Label], Field(min_length=1, max_length=64)]
    passing_labels: Annotated[list[Label], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("'labels' must differ from each other")
        unknown = [label for label in self.passing_labels if label not in self.labels]
        if unknown:
            raise ValueError(f"'passing_labels' must be among 'labels'; {unknown[0]!r} is not")
        return self


class ScoreModelGrader(ScoreModelOptions):
    api_key: ApiKey | None = None


class LabelModelGrader(LabelModelOptions):
    api_key: ApiKey | None = None


class PinnedScoreModelGrader(ScoreModelOptions):
    secret_ref: str


class PinnedLabelModelGrader(LabelModelOptions):
    secret_ref: str


class RewardMessage(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str
    """A template."""


class RewardModelGrader(Thresholded):
    """A sequence-classification model on the worker, in the trainer's process: the logit of its one label, or a label's probability."""

    type: Literal["reward_model"]
    name: Name | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)]
    """A registered model."""
    input: str | Annotated[list[RewardMessage], Field(min_length=1, max_length=64)]
    """A template, tokenized as it is; or messages of templates, put together by the model's own chat template."""
    label: Label | None = None
    """Whose probability is the reward. None: the model has one label, and its logit is the reward."""


class PinnedRewardModelGrader(RewardModelGrader):
    digest: str
    """SHA-256 over the model's folder, checked before step 0. Empty: not pinned."""
    folder: str
    """Where the weights lie, from the run directory."""


JudgeGrader = ScoreModelGrader | LabelModelGrader
PinnedJudgeGrader = PinnedScoreModelGrader | PinnedLabelModelGrader
SingleGrader = (
    StringCheckGrader
    | TextSimilarityGrader
    | PythonGrader
    | InlineEndpointGrader
    | RegisteredEndpointGrader
    | JudgeGrader
    | RewardModelGrader
)
PinnedSingleGrader = (
    StringCheckGrader | TextSimilarityGrader | PythonGrader | PinnedEndpointGrader | PinnedJudgeGrader | PinnedRewardModelGrader
)


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

    @field_validator("graders")
    @classmethod
    def _without_threshold(cls, graders: dict[str, SingleGrader]) -> dict[str, SingleGrader]:
        for name, member in graders.items():
            if isinstance(member, Thresholded) and member.pass_threshold is not None:
                raise ValueError(f"'pass_threshold' of '{name}' would have no effect inside 'multi'; leave it out")
        return graders


class PinnedMultiGrader(_Strict):
    type: Literal["multi"]
    name: Name | None = None
    graders: dict[str, PinnedSingleGrader] = Field(min_length=1)
    calculate_output: str


GraderSpec = SingleGrader | MultiGrader
PinnedGraderSpec = PinnedSingleGrader | PinnedMultiGrader

GRADER_TYPES = ("endpoint", "label_model", "multi", "python", "reward_model", "score_model", "string_check", "text_similarity")


def named_graders(value: Any) -> Any:
    """`multi.graders` as a dict: from a dict, a list whose items have names, or one grader."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        value = [value]
    if not isinstance(value, list):
        return value
    names = [item.get("name") if isinstance(item, dict) else None for item in value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("graders given as a list need a 'name' each")
    if len(set(names)) != len(names):
        raise ValueError("graders given as a list need names that differ")
    return dict(zip(names, value, strict=True))
