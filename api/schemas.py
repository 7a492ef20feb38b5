"""What the API answers: the wire contract's objects plus our fields. Built from rows by `api/views.py`; holds no logic."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from api.pagination import ListPage
from core.lifecycle import Status
from database.reports import ReportKind, ReportStatus


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error of every route, the router's own included."""

    error: ErrorObject
    request_id: str


class FileObject(BaseModel):
    id: str = Field(examples=["file-abc123"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None


class Deleted(BaseModel):
    id: str
    object: str
    deleted: Literal[True] = True


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class JobGraderReport(BaseModel):
    """The newest test of a grader that the job uses, in the version that it pinned."""

    id: str = Field(examples=["graderreport_abc123"])
    grader_id: str
    grader_version: int
    status: ReportStatus
    passed: bool | None
    summary: str | None


class Job(BaseModel):
    """A fine-tuning job. From `options` on: fields that OpenAI's object does not have."""

    id: str = Field(examples=["ftjob-abc123"])
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    seed: int
    integrations: None = None
    metadata: dict[str, str] | None
    method: dict[str, Any]
    user_provided_suffix: str | None
    options: dict[str, Any]
    """The effective options, after preset and defaults."""
    priority: int
    started_at: int | None
    current_step: int | None
    total_steps: int | None
    pause_reason: str | None
    attempt: int
    model_digest: str
    grader_reports: list[JobGraderReport]
    """Of the registered graders that were tested."""


class JobEvent(BaseModel):
    id: str = Field(examples=["ftevent-abc123"])
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobCheckpoint(BaseModel):
    id: str = Field(examples=["ftckpt_abc123"])
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | None]
    """`step`, the contract's names where they are known, and every metric of the step."""


class MetricPoint(BaseModel):
    step: int
    phase: Literal["train", "valid"]
    name: str
    value: float | None
    """None: the trainer reported a number that is not finite."""
    seq: int


class MetricList(BaseModel):
    """Points in the order in which they were stored; `after=<last_seq>` gives what is newer."""

    object: Literal["list"] = "list"
    data: list[MetricPoint]
    has_more: bool
    last_seq: int


class StepDigest(BaseModel):
    id: str = Field(examples=["ftdigest-12"])
    object: Literal["fine_tuning.job.step_digest"] = "fine_tuning.job.step_digest"
    step: int = Field(examples=[12])
    digest: str = Field(examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"])
    """SHA-256 over the digest of the step before and what this step sampled, was graded and computed."""


class StateHash(BaseModel):
    kind: Literal["checkpoint", "resume_point"]
    step: int = Field(examples=[12])
    state_sha256: str = Field(examples=["60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"])
    """Over all trained weights, the state of the optimizers and the rollouts that were sampled ahead."""


class DigestPage(ListPage[StepDigest]):
    """The chain of a job, first step first. Two jobs whose digests agree at a step agree in every step up to it."""

    states: list[StateHash]
    """Of every checkpoint and resume point that is kept and has one; the same on every page."""


class Sample(BaseModel):
    id: str
    object: Literal["fine_tuning.job.sample"] = "fine_tuning.job.sample"
    step: int
    phase: Literal["train", "valid"]
    prompt_index: int
    g: int
    prompt: str
    completion: str
    status: Literal["graded", "abstained", "failed"]
    reward: float | None
    """None: not graded (failed or abstained); never 0 in its place."""
    sub_scores: dict[str, float]
    explanation: str | None
    advantage: float | None
    finish_reason: str
    num_tokens: int
    grader_version: str
    attempts: int
    latency_seconds: float
    error: str | None
    """The code of a grade that failed."""
    error_message: str | None


class Grader(BaseModel):
    id: str = Field(examples=["grader_abc123"])
    object: Literal["grader"] = "grader"
    created_at: int
    updated_at: int
    type: Literal["endpoint"] = "endpoint"
    name: str
    version: int
    url: str
    format: str
    batch_size: int | None = None
    hedge: bool = False
    headers: dict[str, str]
    """Every value is shown as "**********"."""
    timeout_seconds: float
    max_concurrency: int
    rate_limit: float | None
    max_attempts: int
    reward_range: tuple[float, float] | None
    pass_threshold: float | None


class NewGrader(Grader):
    """The only answer that shows the signing secret."""

    signing_secret: str = Field(examples=["whsec_..."])


class RotatedGrader(NewGrader):
    """The only answer that shows the new signing secret."""

    previous_secret_expires_at: int
    """Until then every request carries two signatures, the second by the secret before. Unix seconds."""


class ProbeFinding(BaseModel):
    probe: str = Field(examples=["repeatable"])
    outcome: Literal["passed", "warning", "failed", "skipped"]
    message: str
    numbers: dict[str, float]


class ProbeResult(BaseModel):
    findings: list[ProbeFinding]
    num_rows: int
    num_calls: int
    seconds: float


class Disagreement(BaseModel):
    sample_id: str = Field(examples=["ftsample-12"])
    step: int
    phase: Literal["train", "valid"]
    old_reward: float
    new_reward: float
    old_rank: float
    """From 1, lowest first, among the samples that both graders scored; equal rewards share the mean of their ranks."""
    new_rank: float
    explanation: str | None
    """Of the new grade."""


class RegradeResult(BaseModel):
    job_id: str
    num_graded_samples: int
    """What the job has of the kind that was asked for."""
    old_grader_versions: list[str]
    num_asked: int
    num_compared: int
    """Samples with a score of both graders: what all numbers below are taken over."""
    num_abstained: int
    num_failed: int
    num_not_reached: int
    failures: dict[str, int]
    first_failure: str | None
    spearman: float | None
    """Rank correlation, -1 to 1; None where a side has no two different scores."""
    kendall: float | None
    """Kendall's tau-b, -1 to 1."""
    old_mean: float | None
    new_mean: float | None
    disagreements: list[Disagreement]
    """The largest, by how far the sample moved in the order."""
    seconds: float


class ReportError(BaseModel):
    code: str
    message: str


class GraderReport(BaseModel):
    """Poll it until `status` is `completed` or `failed`; the latter says that there is no result, not that the grader is bad."""

    id: str = Field(examples=["graderreport_abc123"])
    object: Literal["grader.report"] = "grader.report"
    kind: ReportKind
    grader_id: str
    grader_version: int
    status: ReportStatus
    request: dict[str, Any]
    created_at: int
    started_at: int | None
    finished_at: int | None
    passed: bool | None
    """Of a test: no probe failed and none was left out."""
    summary: str | None
    result: ProbeResult | RegradeResult | None
    error: ReportError | None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Literal["base", "fine_tuned"]
    digest: str
    job_id: str | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ApiKey(BaseModel):
    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    project_id: str
    scopes: list[str]
    hint: str
    """The end of the key, to tell keys apart."""
    created_at: int
    expires_at: int | None
    revoked_at: int | None


class NewApiKey(ApiKey):
    """The only answer that shows the key."""

    key: str = Field(examples=["hone-..."])


class GraderErrors(BaseModel):
    """The contract's 14 keys: which kind of failure it was."""

    formula_parse_error: bool = False
    sample_parse_error: bool = False
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    invalid_variable_error: bool = False
    other_error: bool = False
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    model_grader_server_error: bool = False
    model_grader_server_error_details: str | None = None
    model_grader_refusal_error: bool = False
    model_grader_parse_error: bool = False


class GraderRunError(BaseModel):
    code: str
    message: str | None


class GraderRunMetadata(BaseModel):
    name: str
    type: str
    execution_time: float
    scores: dict[str, float]
    token_usage: dict[str, int] | None = None
    """Tokens of all judges together."""
    sampled_model_name: str | None = None
    errors: GraderErrors
    error: GraderRunError | None
    """Ours, like the rest: the stable code of the failure."""
    abstained: bool
    explanation: str | None
    attempts: int


class GraderRun(BaseModel):
    """A grader that fails is an answer, not an error: `reward` is then null and `metadata.errors` says why."""

    reward: float | None
    sub_rewards: dict[str, float]
    model_grader_token_usage_per_model: dict[str, dict[str, int]] = Field(default_factory=dict)
    metadata: GraderRunMetadata


class GraderValidation(BaseModel):
    grader: dict[str, Any]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
