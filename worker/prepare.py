"""Fills the run directory of a new attempt, and takes over what an earlier attempt left on this host. Starts no trainer."""

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from core.errors import StorageError
from core.run_directory import (
    JOB,
    MODEL,
    RESUME,
    RESUME_POINTS,
    REWARDS,
    TRAIN,
    VALID,
    Manifest,
    ModelSource,
    ResolvedJob,
    publish_json,
    published,
    read_manifest,
)
from database.checkpoints import newest_resume_point, resume_point_files
from database.graders import read_job_secrets
from database.models import ResumePoint, ResumePointFile
from worker.base_model import model_folder
from worker.context import Holding
from worker.fetch import fetch_file
from worker.publish import adopt_checkpoints
from worker.relay import Relay
from worker.trainer_process import kill_left_over

logger = logging.getLogger("hone.worker")


class Prepared(NamedTuple):
    secrets: dict[str, Any]
    """{secret_ref: {"headers": {...}, "signing_secret": ...}}, for the pipe and the redactor only."""

    from_step: int


def prepare(holding: Holding) -> Prepared:
    """`holding.directory`, ready for the trainer. Raises: PlatformError, OSError; LeaseLost, WindDown."""
    directory = holding.directory
    _make_private(directory)
    job = holding.claim.job
    older = _older_directories(directory)
    for old in older:
        if kill_left_over(old):
            logger.warning("%s: killed the trainer of attempt %s, whose worker is gone", job.id, old.name)
    resolved = resolve(holding)
    publish_json(directory / JOB, resolved)
    fetch_file(holding, job.training_blob, directory / TRAIN)
    if job.validation_blob is not None:
        fetch_file(holding, job.validation_blob, directory / VALID)
    (directory / MODEL).symlink_to(model_folder(holding, job.model, job.model_digest))
    _link_reward_models(holding)
    secrets = holding.read(lambda session: read_job_secrets(session, holding.worker.secrets, job))
    return Prepared(secrets, _take_over(holding, older))


def resolve(holding: Holding) -> ResolvedJob:
    job, worker = holding.claim.job, holding.worker
    values = {
        "job_id": job.id,
        "attempt": holding.attempt,
        "algorithm": job.algorithm,
        "options": job.options,
        "seed": job.seed,
        "grader": job.grader,
        "response_format": job.response_format,
        "model": ModelSource(name=job.model, digest="" if job.model.startswith("ft:") else job.model_digest),
        "num_threads": worker.num_threads,
        "allowed_private_networks": worker.settings.allowed_private_networks,
        "allow_http_graders": worker.settings.allow_http_graders,
        "grader_patience_seconds": worker.settings.grader_patience_seconds,
    }
    return ResolvedJob.model_validate(values)


def _link_reward_models(holding: Holding) -> None:
    """The models that grade, each where its pinned grader looks for it."""
    grader = holding.claim.job.grader
    for spec in [grader, *grader.get("graders", {}).values()]:
        link = holding.directory / spec.get("folder", "")
        if spec["type"] == "reward_model" and not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(model_folder(holding, spec["model"], spec["digest"]))


def call_limits(holding: Holding) -> dict[str, str]:
    """What the trainer's calls to graders share with those of its project's other jobs. The URL may hold a password: for the pipe only."""
    job = holding.claim.job
    return {"broker_url": holding.worker.settings.effective_broker_url(), "scope": job.project_id, "owner": job.id}


def _make_private(directory: Path) -> None:
    """A new directory that only we can enter. One that is there is of a claim that the database has forgotten."""
    if directory.exists():
        kill_left_over(directory)
        shutil.rmtree(directory)
    for folder in (directory.parent.parent, directory.parent, directory):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)


def _older_directories(directory: Path) -> list[Path]:
    """Those of the attempts right before this one, newest first, as far back as all of them ran on this host."""
    found: list[Path] = []
    attempt = int(directory.name) - 1
    while (old := directory.with_name(str(attempt))).is_dir():
        found.append(old)
        attempt -= 1
    return found


def _take_over(holding: Holding, older: list[Path]) -> int:
    """The step from which this attempt goes on; its state lies in resume/, and nothing that the older ones wrote before it is lost."""
    for old in reversed(older):
        Relay(holding, old, int(old.name)).forward_new_lines()
    step = _resume(holding, older)
    for old in reversed(older):
        adopt_checkpoints(holding, old, step)
    _keep_journal(holding.directory, older)
    for superfluous in older[1:]:
        shutil.rmtree(superfluous)
    return step


def _resume(holding: Holding, older: list[Path]) -> int:
    """Fills resume/ with the newest whole resume point, of this host or published; 0 where there is none."""
    local = next((found for old in older if (found := _newest_local(old)) is not None), None)
    point, files = holding.read(lambda session: _published_point(session, holding.job_id))
    local_step = -1 if local is None else read_manifest(local).step
    if point is not None and point.step > local_step:
        return _fetch_point(holding, Manifest.model_validate(point.manifest), files)
    if local is None:
        return 0
    shutil.copytree(local, holding.directory / RESUME, copy_function=_link)
    return local_step


def _newest_local(old: Path) -> Path | None:
    """The newest resume point in `old` whose files are what its manifest says."""
    for folder in [*reversed(published(old, RESUME_POINTS)), old / RESUME]:
        if is_whole(folder):
            return folder
        if folder.is_dir():
            logger.warning("%s is damaged and was passed over", folder)
    return None


def is_whole(folder: Path) -> bool:
    """Whether `folder` has a manifest and every file in it with the right digest."""
    try:
        manifest = read_manifest(folder)
        return all(_sha256(folder / entry.name) == entry.sha256 for entry in manifest.files)
    except (FileNotFoundError, ValueError):
        return False


def _fetch_point(holding: Holding, manifest: Manifest, files: list[ResumePointFile]) -> int:
    aside = holding.directory / f"{RESUME}.tmp"
    for file in files:
        fetch_file(holding, file.blob, aside / file.name, file.bytes)
    aside.mkdir(exist_ok=True)
    publish_json(aside / "manifest.json", manifest)
    if not is_whole(aside):
        raise StorageError(f"The published resume point of step {manifest.step} is damaged.", retryable=False)
    os.replace(aside, holding.directory / RESUME)
    return manifest.step


def _published_point(session: Session, job_id: str) -> tuple[ResumePoint | None, list[ResumePointFile]]:
    point = newest_resume_point(session, job_id)
    return point, [] if point is None else resume_point_files(session, point.id)


def _keep_journal(directory: Path, older: list[Path]) -> None:
    """The grades that were paid for already, also those behind the resume point."""
    journal = next((old / REWARDS for old in older if (old / REWARDS).exists()), None)
    if journal is not None:
        shutil.copyfile(journal, directory / REWARDS)


def _link(source: str, target: str) -> str:
    """No second copy of what may be gigabytes; another file system gets one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
