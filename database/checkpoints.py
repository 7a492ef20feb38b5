"""Checkpoints (weights to sample from) and resume points (state to go on from): rows that name blobs, under the token."""

import hashlib
from collections.abc import Sequence

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from core.run_directory import STATE_HASH, Manifest
from database.base_models import register_model
from database.blobs import BlobInfo
from database.guards import guard
from database.models import Checkpoint, CheckpointFile, Job, Model, Project, ResumePoint, ResumePointFile
from database.pages import Page
from database.progress import add_event
from database.sql import clock, fetch_page, insert_row, new_id, update_row

StoredFiles = Sequence[tuple[str, BlobInfo]]
BEST_BY = "valid_reward_mean"


def publish_checkpoint(
    session: Session, job_id: str, token: str, *, step: int, manifest: Manifest, files: StoredFiles, keep: int
) -> Checkpoint:
    """The checkpoint of `step`; of the older ones the `keep` - 1 with the highest `valid_reward_mean` stay.

    A step that an earlier attempt published is replaced under the same id. Raises: LeaseLost.
    """
    job = guard(session, job_id, token)
    values = {"metrics": manifest.metrics, "manifest": manifest.model_dump(mode="json"), "created_at": clock()}
    statement = update(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == step).values(values)
    checkpoint = update_row(session, statement, Checkpoint)
    if checkpoint is None:
        name = f"{fine_tuned_model_name(session, job)}:ckpt-step-{step}"
        checkpoint = insert_row(session, Checkpoint, id=new_id("ftckpt_"), job_id=job_id, step=step, name=name, **values)
        add_event(session, job_id, level="info", message=f"Checkpoint created at step {step}", attempt=job.attempt)
    session.execute(delete(CheckpointFile).where(CheckpointFile.checkpoint_id == checkpoint.id))
    rows = [{"checkpoint_id": checkpoint.id, **row} for row in _file_rows(files)]
    if rows:
        session.execute(insert(CheckpointFile), rows)
    _drop_worst(session, checkpoint, keep)
    return checkpoint


def list_checkpoints(session: Session, job_id: str, *, after: str | None, limit: int) -> Page[Checkpoint]:
    """Newest step first; `job_id` came from `jobs.get_job`. Raises: InvalidRequest for an unknown `after`."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return fetch_page(session, query, (Checkpoint.step,), after=after, limit=limit, id_column=Checkpoint.id)


def list_states(session: Session, job_id: str) -> list[Manifest]:
    """The manifests, by step, of the checkpoints and the resume point of the job that say what hash all its state had."""
    query = select(Checkpoint.manifest).where(Checkpoint.job_id == job_id)
    stored = list(session.execute(query).scalars())
    point = newest_resume_point(session, job_id)
    manifests = [Manifest.model_validate(manifest) for manifest in [*stored, *([point.manifest] if point else [])]]
    return sorted((manifest for manifest in manifests if STATE_HASH in manifest.facts), key=lambda manifest: manifest.step)


def checkpoint_files(session: Session, checkpoint_id: str) -> list[CheckpointFile]:
    query = select(CheckpointFile).where(CheckpointFile.checkpoint_id == checkpoint_id).order_by(CheckpointFile.name)
    return list(session.execute(query).scalars())


def publish_resume_point(session: Session, job_id: str, token: str, *, step: int, manifest: Manifest, files: StoredFiles) -> ResumePoint:
    """The job's one resume point, in place of the older; the job made progress, so its failures count from 0. Raises: LeaseLost."""
    job = guard(session, job_id, token, failures=0)
    drop_resume_points(session, job_id)
    point = insert_row(
        session,
        ResumePoint,
        id=new_id("resume_"),
        job_id=job_id,
        step=step,
        attempt=job.attempt,
        manifest=manifest.model_dump(mode="json"),
        created_at=clock(),
    )
    rows = [{"resume_point_id": point.id, **row} for row in _file_rows(files)]
    if rows:
        session.execute(insert(ResumePointFile), rows)
    return point


def newest_resume_point(session: Session, job_id: str) -> ResumePoint | None:
    query = select(ResumePoint).where(ResumePoint.job_id == job_id).order_by(ResumePoint.step.desc()).limit(1)
    return session.execute(query).scalar_one_or_none()


def resume_point_files(session: Session, resume_point_id: str) -> list[ResumePointFile]:
    query = select(ResumePointFile).where(ResumePointFile.resume_point_id == resume_point_id).order_by(ResumePointFile.name)
    return list(session.execute(query).scalars())


def drop_resume_points(session: Session, job_id: str) -> None:
    session.execute(delete(ResumePoint).where(ResumePoint.job_id == job_id))


def final_model(session: Session, job_id: str, token: str, checkpoint: Checkpoint) -> Model:
    """The job's fine-tuned model, registered in its project with the weights of `checkpoint`.

    An attempt that comes here again after a crash points the same model to its own checkpoint. Raises: LeaseLost.
    """
    job = guard(session, job_id, token)
    name = fine_tuned_model_name(session, job)
    guard(session, job_id, token, fine_tuned_model=name)
    source = {"type": "checkpoint", "checkpoint": checkpoint.id, "base": job.model}
    digest = _digest(checkpoint_files(session, checkpoint.id))
    changes = {"source": source, "digest": digest, "checkpoint_id": checkpoint.id}
    model = update_row(session, update(Model).where(Model.job_id == job_id, Model.deleted_at.is_(None)).values(changes), Model)
    if model is not None:
        return model
    add_event(session, job_id, level="info", message=f"New fine-tuned model created: {name}", attempt=job.attempt)
    return register_model(
        session,
        name=name,
        project_id=job.project_id,
        kind="fine_tuned",
        source=source,
        digest=digest,
        job_id=job_id,
        checkpoint_id=checkpoint.id,
    )


def fine_tuned_model_name(session: Session, job: Job) -> str:
    """`ft:<base>:<project>:<suffix>:<8 characters of the job's id>`: known before the model exists."""
    project = session.execute(select(Project.name).where(Project.id == job.project_id)).scalar_one()
    return f"ft:{job.model}:{project}:{job.suffix or ''}:{job.id[-8:]}"


def _drop_worst(session: Session, newest: Checkpoint, keep: int) -> None:
    """Keeps `newest`, the best of the others, and whatever is a model."""
    is_model = select(Model.checkpoint_id).where(Model.job_id == newest.job_id, Model.checkpoint_id.is_not(None))
    query = select(Checkpoint).where(
        Checkpoint.job_id == newest.job_id, Checkpoint.id != newest.id, Checkpoint.id.not_in(is_model), Checkpoint.step < newest.step
    )
    others = list(session.execute(query).scalars())
    others.sort(key=lambda other: (other.metrics.get(BEST_BY, float("-inf")), other.step), reverse=True)
    for other in others[max(keep - 1, 0) :]:
        session.execute(delete(Checkpoint).where(Checkpoint.id == other.id))


def _file_rows(files: StoredFiles) -> list[dict[str, str | int]]:
    return [{"name": name, "blob": blob.id, "bytes": blob.bytes, "sha256": blob.sha256} for name, blob in files]


def _digest(files: Sequence[CheckpointFile]) -> str:
    """SHA-256 over the lines "<sha256>  <name>", sorted by name."""
    return hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()
