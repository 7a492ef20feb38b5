"""What outlives the process: checkpoints (models to sample from) and resume points (all that training needs to go on bit for bit).

Both are written aside, synced, and published by renaming the folder; the manifest is written last.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from core.errors import TrainingError, boundary
from core.run_directory import (
    CHECKPOINTS,
    EVENTS,
    MANIFEST,
    METRICS,
    RESUME,
    RESUME_POINTS,
    REWARDS,
    SAMPLES,
    STATE_HASH,
    FileEntry,
    Manifest,
    fsync_folder,
    publish_json,
    published,
    read_manifest,
    step_folder,
)
from trainer.doctor import DoctorState

WEIGHTS, LEARNER, PENDING = "weights.pt", "learner.pt", "pending.pt"
KEPT_RESUME_POINTS = 2
OUTPUTS = (METRICS, EVENTS, SAMPLES)


class Progress(BaseModel):
    """Where a run stands between two steps; with weights, optimizers and rollouts sampled ahead, all there is to resume."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = 0
    """Steps done. Random numbers and the order of prompts are functions of it."""

    digest: str = ""
    trained_tokens: int = 0
    evaluated_step: int = -1
    """The last step whose weights were evaluated."""

    announced_step: int = 0
    checkpointed_step: int = 0
    train_metrics: dict[str, float] = Field(default_factory=dict)
    valid_metrics: dict[str, float] = Field(default_factory=dict)
    """Of the last evaluation."""

    best_reward: float | None = None
    """The highest `valid_reward_mean` so far."""

    evaluations_since_best: int = 0
    ended_early: str = ""
    """Why the run ends before its last step; empty while it goes on."""

    doctor: DoctorState = Field(default_factory=DoctorState)


def save_checkpoint(run_directory: Path, step: int, write: Callable[[Path], str], metrics: dict[str, float], facts: dict[str, Any]) -> Path:
    """checkpoints/step_NNNNNN with what `write` puts there; `write` returns the weights' format."""

    def fill(folder: Path) -> Manifest:
        weights_format = write(folder)
        files = _entries(folder)
        return Manifest(kind="checkpoint", step=step, files=files, metrics=metrics, facts={**facts, "format": weights_format})

    return _publish(run_directory / CHECKPOINTS / step_folder(step), fill)


def prune_checkpoints(run_directory: Path, keep: int) -> None:
    """Leaves the newest two and the `keep` best by `valid_reward_mean`: what is kept in the end, and one that may be being read."""
    folders = published(run_directory, CHECKPOINTS)
    scores = {folder: read_manifest(folder).metrics.get("valid_reward_mean", -math.inf) for folder in folders}
    best = sorted(folders, key=lambda folder: scores[folder])[-keep:]
    for folder in folders[:-2]:
        if folder not in best:
            _remove(folder)


def save_resume_point(
    run_directory: Path,
    progress: Progress,
    weights: dict[str, Tensor],
    learner: dict[str, Any],
    pending: dict[str, Any] | None,
    journal_lines: list[dict[str, Any]],
    facts: dict[str, Any],
) -> Path:
    """resume_points/step_NNNNNN; the newest two are kept.

    `learner` is the state of `update.Learner`, `pending` the rollouts that were sampled ahead.
    """

    def fill(folder: Path) -> Manifest:
        torch.save(weights, folder / WEIGHTS)
        torch.save(learner, folder / LEARNER)
        torch.save(pending, folder / PENDING)
        (folder / REWARDS).write_text("".join(json.dumps(line) + "\n" for line in journal_lines))
        own = {
            "progress": progress.model_dump(),
            "lengths": {name: _size(run_directory / name) for name in OUTPUTS},
            STATE_HASH: state_digest({"weights": weights, "learner": learner, "pending": pending}),
        }
        return Manifest(kind="resume_point", step=progress.step, files=_entries(folder), facts={**facts, **own})

    target = _publish(run_directory / RESUME_POINTS / step_folder(progress.step), fill)
    for old in published(run_directory, RESUME_POINTS)[:-KEPT_RESUME_POINTS]:
        _remove(old)
    return target


class ResumePoint:
    """A verified resume point on disk."""

    def __init__(self, folder: Path) -> None:
        """Raises: TrainingError where a file is missing or damaged."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        for entry in self.manifest.files:
            path = folder / entry.name
            if not path.is_file() or _sha256(path) != entry.sha256:
                raise TrainingError(f"The resume point of step {self.manifest.step} is damaged: {entry.name}.", code="resume_damaged")

    @property
    def progress(self) -> Progress:
        return Progress.model_validate(self.manifest.facts["progress"])

    def load(self, load_weights: Callable[[dict[str, Tensor]], None], load_learner: Callable[[dict[str, Any]], None]) -> None:
        with boundary(TrainingError, f"resume point of step {self.manifest.step}"):
            load_weights(torch.load(self.folder / WEIGHTS, map_location="cpu", weights_only=True))
            load_learner(torch.load(self.folder / LEARNER, map_location="cpu", weights_only=True))

    def pending(self, device: torch.device) -> dict[str, Any] | None:
        """What `save_resume_point` got as such."""
        with boundary(TrainingError, f"resume point of step {self.manifest.step}"):
            plain: dict[str, Any] | None = torch.load(self.folder / PENDING, map_location="cpu", weights_only=True)
        if plain is not None and plain["old_logprobs"] is not None:
            plain["old_logprobs"] = plain["old_logprobs"].to(device)
        return plain


def find_resume_point(run_directory: Path) -> ResumePoint | None:
    """The newest point of this directory itself, else the one handed over in resume/."""
    own = published(run_directory, RESUME_POINTS)
    if own:
        return ResumePoint(own[-1])
    handed = run_directory / RESUME
    return ResumePoint(handed) if (handed / MANIFEST).exists() else None


def restore_outputs(run_directory: Path, point: ResumePoint | None) -> None:
    """Cuts the output files back to where `point` left them, and carries over its part of the reward journal.

    A point that was handed over comes from another directory, so here all output before it is empty.
    """
    is_own = point is not None and point.folder.parent.name == RESUME_POINTS
    lengths = point.manifest.facts["lengths"] if point is not None and is_own else dict.fromkeys(OUTPUTS, 0)
    for name in OUTPUTS:
        path = run_directory / name
        if _size(path) > lengths[name]:
            os.truncate(path, lengths[name])
    journal = run_directory / REWARDS
    if point is not None and not is_own and not journal.exists():
        shutil.copyfile(point.folder / REWARDS, journal)


def state_digest(state: Any) -> str:
    """SHA-256 over names, shapes and bytes of everything in nested dicts and lists of tensors and numbers."""
    chain = hashlib.sha256()
    _update(chain, state)
    return chain.hexdigest()


def _update(chain: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        chain.update(f"{tuple(value.shape)}{value.dtype}".encode())
        chain.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        for name in value:
            chain.update(str(name).encode())
            _update(chain, value[name])
    elif isinstance(value, list | tuple):
        for part in value:
            _update(chain, part)
    else:
        chain.update(repr(value).encode())


def _publish(target: Path, fill: Callable[[Path], Manifest]) -> Path:
    """Fills a folder beside `target`, syncs it, writes the manifest and renames it into place, over an older one."""
    target.parent.mkdir(exist_ok=True)
    fsync_folder(target.parent.parent)
    temporary = target.with_name(target.name + ".tmp")
    if temporary.exists():
        _remove(temporary)
    temporary.mkdir()
    manifest = fill(temporary)
    for entry in manifest.files:
        _fsync_file(temporary / entry.name)
    publish_json(temporary / MANIFEST, manifest)
    if target.exists():
        _remove(target)
    os.replace(temporary, target)
    fsync_folder(target.parent)
    return target


def _remove(folder: Path) -> None:
    """The manifest goes first: without it the folder is not there for any reader."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _entries(folder: Path) -> list[FileEntry]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [FileEntry(name=str(path.relative_to(folder)), bytes=path.stat().st_size, sha256=_sha256(path)) for path in paths]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
