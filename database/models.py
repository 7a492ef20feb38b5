"""Every table, twice declared nowhere else: `Base` is the main database, `BlobBase` the chunks (SQLite keeps those in a second file).

Times are seconds since 1970 by the database's clock. Rows carry no relationships: what a function needs, it selects.
"""

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from database.columns import Base as Base
from database.columns import BlobBase as BlobBase
from database.columns import job_column, where


class Project(Base):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    created_at: Mapped[float]


class ApiKey(Base):
    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    key_hash: Mapped[str] = mapped_column(unique=True)
    """SHA-256 of the clear key, which has 256 random bits and is stored nowhere."""
    hint: Mapped[str]
    """The end of the clear key, to tell keys apart."""
    scopes: Mapped[list[str]]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class File(Base):
    __tablename__ = "files"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    blob: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class Grader(Base):
    __tablename__ = "graders"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    version: Mapped[int]
    """The newest version; jobs pin the one current at submit."""
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]


class GraderVersion(Base):
    __tablename__ = "grader_versions"
    grader_id: Mapped[str] = mapped_column(ForeignKey("graders.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    options: Mapped[dict[str, Any]]
    """core.grader_specs.EndpointOptions."""
    header_names: Mapped[list[str]]
    secrets: Mapped[str]
    """Encrypted {"headers": {...}, "signing_secret": "whsec_..."}."""
    created_at: Mapped[float]


class GraderReport(Base):
    """What housekeeping found out about one version of a grader, asked for through the API and claimed by a lease."""

    __tablename__ = "grader_reports"
    __table_args__ = (
        Index(None, "grader_id", "created_at", "id"),
        Index("ix_grader_reports_open", "created_at", **where("finished_at IS NULL")),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    grader_id: Mapped[str] = mapped_column(ForeignKey("graders.id", ondelete="CASCADE"))
    grader_version: Mapped[int]
    kind: Mapped[str]
    """`test` or `regrade`."""
    request: Mapped[dict[str, Any]]
    status: Mapped[str]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    tries: Mapped[int]
    """How often it was claimed."""
    lease_token: Mapped[str | None]
    lease_expires_at: Mapped[float | None]
    passed: Mapped[bool | None]
    """Of a test that is done."""
    summary: Mapped[str | None]
    result: Mapped[dict[str, Any] | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]


class Model(Base):
    __tablename__ = "models"
    __table_args__ = (
        Index("uq_models_shared_name", "name", unique=True, **where("project_id IS NULL AND deleted_at IS NULL")),
        Index("uq_models_project_name", "project_id", "name", unique=True, **where("deleted_at IS NULL")),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    """None: a base model that every project sees."""
    kind: Mapped[str]
    source: Mapped[dict[str, Any]]
    digest: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    checkpoint_id: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.id"))
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index("ix_jobs_queued", "priority", "created_at", **where("status = 'queued'")),
        Index("ix_jobs_running", "project_id", **where("status = 'running'")),
        Index("ix_jobs_validating", "created_at", **where("status = 'validating_files'")),
        Index("ix_jobs_probe", "probe_at", **where("status = 'paused' AND pause_reason = 'grader_unavailable'")),
        Index("ix_jobs_lease", "lease_expires_at", **where("lease_expires_at IS NOT NULL")),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    status: Mapped[str]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    """Set when the status is terminal AND nobody holds a lease any more."""
    updated_at: Mapped[float]
    model: Mapped[str]
    model_digest: Mapped[str]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    training_blob: Mapped[str]
    validation_blob: Mapped[str | None]
    num_training_rows: Mapped[int | None]
    num_validation_rows: Mapped[int | None]
    request: Mapped[dict[str, Any]]
    """The request as it is echoed: secrets masked."""
    algorithm: Mapped[str]
    options: Mapped[dict[str, Any]]
    """core.options.Options, dumped whole."""
    grader: Mapped[dict[str, Any]]
    """core.grader_specs.PinnedGraderSpec."""
    secrets: Mapped[str | None]
    """Encrypted {secret_ref: {"headers": {...}, "signing_secret": ...}} of graders given inline."""
    response_format: Mapped[dict[str, Any] | None]
    seed: Mapped[int]
    suffix: Mapped[str | None]
    job_metadata: Mapped[dict[str, Any] | None]
    priority: Mapped[int]
    gpu_class: Mapped[str]
    attempt: Mapped[int]
    """How often the job was claimed; fences, bounds nothing."""
    failures: Mapped[int]
    """Ends by fault in a row since the newest resume point."""
    lease_token: Mapped[str | None]
    lease_expires_at: Mapped[float | None]
    worker: Mapped[str | None]
    pause_reason: Mapped[str | None]
    probes: Mapped[int] = mapped_column(server_default="0")
    """How often the grader was probed for this job since its last step."""
    probe_at: Mapped[float | None]
    """Not before then is it probed (again). None: at once."""
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    current_step: Mapped[int | None]
    total_steps: Mapped[int | None]
    estimated_finish: Mapped[float | None]
    seq: Mapped[int] = mapped_column(BigInteger)
    """The last number given to an event, metric or sample of this job."""


class Attempt(Base):
    __tablename__ = "attempts"
    job_id: Mapped[str] = job_column()
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]
    host: Mapped[str]
    device: Mapped[str]
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    reason: Mapped[str | None]
    from_step: Mapped[int | None]
    to_step: Mapped[int | None]


class Event(Base):
    __tablename__ = "events"
    __table_args__ = (Index(None, "job_id", "seq", unique=True), UniqueConstraint("job_id", "attempt", "line"))
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    seq: Mapped[int] = mapped_column(BigInteger)
    attempt: Mapped[int]
    line: Mapped[int | None]
    """Number of the line in the attempt's events.jsonl, from 0; None for events of the platform."""
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


class Metric(Base):
    __tablename__ = "metrics"
    __table_args__ = (Index(None, "job_id", "seq", unique=True),)
    job_id: Mapped[str] = job_column()
    step: Mapped[int] = mapped_column(primary_key=True)
    phase: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float | None]
    """None: the trainer reported a number that is not finite."""
    attempt: Mapped[int]
    seq: Mapped[int] = mapped_column(BigInteger)


class StepDigest(Base):
    """What a step computed, as one hash: a later attempt that does the step again is compared with it."""

    __tablename__ = "step_digests"
    job_id: Mapped[str] = job_column()
    step: Mapped[int] = mapped_column(primary_key=True)
    phase: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]


class Sample(Base):
    __tablename__ = "samples"
    __table_args__ = (Index(None, "job_id", "seq", unique=True), Index(None, "job_id", "step", "reward"))
    job_id: Mapped[str] = job_column()
    step: Mapped[int] = mapped_column(primary_key=True)
    phase: Mapped[str] = mapped_column(primary_key=True)
    prompt_index: Mapped[int] = mapped_column(primary_key=True)
    g: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str]
    completion: Mapped[str]
    reward: Mapped[float | None]
    """None: not graded (failed or abstained), never 0 in its place."""
    sub_scores: Mapped[dict[str, Any]]
    explanation: Mapped[str | None]
    advantage: Mapped[float | None]
    finish_reason: Mapped[str]
    num_tokens: Mapped[int]
    grader_version: Mapped[str]
    attempts: Mapped[int]
    """How often the grader was called for this completion."""
    latency_seconds: Mapped[float]
    error: Mapped[str | None]
    error_message: Mapped[str | None]
    seq: Mapped[int] = mapped_column(BigInteger)


class RelayOffset(Base):
    """How much of an attempt's file is stored: bytes up to a line's end, and lines."""

    __tablename__ = "relay_offsets"
    job_id: Mapped[str] = job_column()
    attempt: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[str] = mapped_column(primary_key=True)
    offset: Mapped[int] = mapped_column(BigInteger)
    lines: Mapped[int] = mapped_column(BigInteger)


class Checkpoint(Base):
    """Weights that can be sampled from and may become a model."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    name: Mapped[str] = mapped_column(unique=True)
    metrics: Mapped[dict[str, Any]]
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class CheckpointFile(Base):
    __tablename__ = "checkpoint_files"
    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    blob: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]


class ResumePoint(Base):
    """Everything from which an unfinished job goes on; the newest one only, dropped at the end."""

    __tablename__ = "resume_points"
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step: Mapped[int]
    attempt: Mapped[int]
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class ResumePointFile(Base):
    __tablename__ = "resume_point_files"
    resume_point_id: Mapped[str] = mapped_column(ForeignKey("resume_points.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    blob: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]


UPLOADING, READY = "uploading", "ready"


class BlobManifest(BlobBase):
    """One stored byte string. UPLOADING until its writer is done; then READY and never changed."""

    __tablename__ = "blob_manifests"
    __table_args__ = (Index(None, "status", "created_at"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    status: Mapped[str]
    expires_at: Mapped[float | None]
    """While `uploading`: when the collector may take it for abandoned."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    created_at: Mapped[float]


class BlobChunk(BlobBase):
    """Bytes by their SHA-256: in `data`, or in the object store under `object_key`."""

    __tablename__ = "blob_chunks"
    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    data: Mapped[bytes | None] = mapped_column(LargeBinary)
    object_key: Mapped[str | None]


class BlobChunkRef(BlobBase):
    __tablename__ = "blob_chunk_refs"
    manifest_id: Mapped[str] = mapped_column(ForeignKey("blob_manifests.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("blob_chunks.digest"), index=True)


class BlobGarbage(BlobBase):
    """An object in the store that no chunk names (yet): written before the upload, gone when a chunk takes it over."""

    __tablename__ = "blob_garbage"
    object_key: Mapped[str] = mapped_column(primary_key=True)
    not_before: Mapped[float]
    """From when on the collector may delete the object."""
    is_claimed: Mapped[bool]
    """True: the collector is deleting it, so no chunk may name it any more."""
