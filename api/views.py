"""Rows of the database as the objects that the API answers. Nothing secret is in a row's shown columns, so nothing is filtered here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, TypeAdapter

from api import schemas
from core.grader_specs import PinnedGraderSpec
from core.lifecycle import Status
from core.options import Options
from core.run_directory import STATE_HASH, Manifest
from database import models
from database.graders import MASK
from database.progress import SAMPLE_PREFIX
from graders.check import endpoints_of

Version = tuple[str, int]
"""(grader id, version) of a registered grader."""

_PINNED: TypeAdapter[Any] = TypeAdapter(PinnedGraderSpec)

CONTRACT_HYPERPARAMETERS = (
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "compute_multiplier",
    "reasoning_effort",
    "eval_interval",
    "eval_samples",
)
"""The contract's seven, which a job always shows."""

DIGEST_PREFIX = "ftdigest-"
"""Before the step."""

CHECKPOINT_METRICS = {
    "train_loss": "loss",
    "train_mean_reward": "reward_mean",
    "train_reward_mean": "reward_mean",
    "full_valid_mean_reward": "valid_reward_mean",
}
"""The contract's name of a metric -> ours."""


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def _columns(row: models.Base, schema: type[BaseModel], **others: Any) -> dict[str, Any]:
    """`others`, and every column of `row` that has a field of its name in `schema`."""
    names = schema.model_fields.keys() & row.__table__.columns.keys() - others.keys()
    return {**{name: getattr(row, name) for name in names}, **others}


def file_view(file: models.File) -> schemas.FileObject:
    return schemas.FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        expires_at=_seconds(file.expires_at),
    )


def job_view(job: models.Job, organization_id: str, tests: Mapping[Version, models.GraderReport] = MappingProxyType({})) -> schemas.Job:
    """`tests` has the newest one of each registered grader's version, as far as there is one."""
    return schemas.Job(
        id=job.id,
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        finished_at=_seconds(job.finished_at),
        estimated_finish=_seconds(job.estimated_finish),
        model=job.model,
        model_digest=job.model_digest,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=organization_id,
        status=Status(job.status),
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=[],
        trained_tokens=job.trained_tokens,
        error=_job_error(job),
        seed=job.seed,
        metadata=job.job_metadata,
        method=_method(job),
        user_provided_suffix=job.suffix,
        options=job.options,
        priority=job.priority,
        current_step=job.current_step,
        total_steps=job.total_steps,
        pause_reason=job.pause_reason,
        attempt=job.attempt,
        grader_reports=[_job_report(tests[version]) for version in registered_versions(job) if version in tests],
    )


def registered_versions(job: models.Job) -> list[Version]:
    """The registered graders that the job pinned."""
    pinned = [endpoint.grader_version.partition("@") for endpoint in endpoints_of(_PINNED.validate_python(job.grader))]
    return [(grader_id, int(number)) for grader_id, _, number in pinned if number]


def _job_report(report: models.GraderReport) -> schemas.JobGraderReport:
    return schemas.JobGraderReport(**_columns(report, schemas.JobGraderReport))


def _job_error(job: models.Job) -> schemas.JobError | None:
    if job.error_code is None:
        return None
    return schemas.JobError(code=job.error_code, message=job.error_message or "", param=job.error_param)


def _method(job: models.Job) -> dict[str, Any]:
    """The method as it was sent, with the hyperparameters that were not: "auto" in a fresh job, their values once it is validated."""
    sent = job.request["method"]
    block = sent["reinforcement"]
    filled: dict[str, Any] = {}
    for name in CONTRACT_HYPERPARAMETERS:
        automatic = Options.model_fields[name].default if name == "reasoning_effort" else "auto"
        value = job.options.get(name) if job.status != Status.VALIDATING_FILES else None
        filled[name] = automatic if value is None else value
    given = {name: value for name, value in (block.get("hyperparameters") or {}).items() if value not in (None, "auto")}
    algorithm = {"algorithm": job.algorithm}
    return {**sent, "reinforcement": {**block, **algorithm, "hyperparameters": {**filled, **given}}}


def event_view(event: models.Event) -> schemas.JobEvent:
    return schemas.JobEvent(**_columns(event, schemas.JobEvent, created_at=int(event.created_at)))


def checkpoint_view(checkpoint: models.Checkpoint) -> schemas.JobCheckpoint:
    """The step's metrics under their own names and, where there is a counterpart, under the contract's."""
    metrics = checkpoint.metrics
    contract = {theirs: metrics[ours] for theirs, ours in CHECKPOINT_METRICS.items() if ours in metrics}
    return schemas.JobCheckpoint(
        id=checkpoint.id,
        created_at=int(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.name,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics={**metrics, **contract, "step": checkpoint.step},
    )


def metric_view(metric: models.Metric) -> schemas.MetricPoint:
    return schemas.MetricPoint(**_columns(metric, schemas.MetricPoint))


def digest_view(digest: models.StepDigest) -> schemas.StepDigest:
    return schemas.StepDigest(id=f"{DIGEST_PREFIX}{digest.step}", step=digest.step, digest=digest.digest)


def state_view(manifest: Manifest) -> schemas.StateHash:
    return schemas.StateHash(kind=manifest.kind, step=manifest.step, state_sha256=manifest.facts[STATE_HASH])


def sample_view(sample: models.Sample) -> schemas.Sample:
    status = "graded" if sample.reward is not None else "abstained" if sample.error is None else "failed"
    return schemas.Sample(**_columns(sample, schemas.Sample, id=f"{SAMPLE_PREFIX}{sample.seq}", status=status))


def grader_view(grader: models.Grader, version: models.GraderVersion) -> schemas.Grader:
    return schemas.Grader(
        id=grader.id,
        created_at=int(grader.created_at),
        updated_at=int(version.created_at),
        name=grader.name,
        version=version.version,
        headers=dict.fromkeys(version.header_names, MASK),
        **version.options,
    )


def report_view(report: models.GraderReport) -> schemas.GraderReport:
    error = None if report.error_code is None else schemas.ReportError(code=report.error_code, message=report.error_message or "")
    return schemas.GraderReport(
        **_columns(
            report,
            schemas.GraderReport,
            created_at=int(report.created_at),
            started_at=_seconds(report.started_at),
            finished_at=_seconds(report.finished_at),
            request={name: value for name, value in report.request.items() if name != "blob"},
            error=error,
        )
    )


def model_view(model: models.Model, organization_id: str) -> schemas.Model:
    owner = "system" if model.project_id is None else organization_id
    return schemas.Model(**_columns(model, schemas.Model, id=model.name, created=int(model.created_at), owned_by=owner))


def key_view(key: models.ApiKey) -> schemas.ApiKey:
    return schemas.ApiKey(
        id=key.id,
        name=key.name,
        project_id=key.project_id,
        scopes=key.scopes,
        hint=key.hint,
        created_at=int(key.created_at),
        expires_at=_seconds(key.expires_at),
        revoked_at=_seconds(key.revoked_at),
    )
