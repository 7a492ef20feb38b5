"""Every file that worker and trainer share: names, formats and the few operations that must not be done halfway.

In:  job.json  train.jsonl  valid.jsonl  model/  (reward_models/)  (resume/)
Out: metrics.jsonl  events.jsonl  samples.jsonl  rewards.jsonl  trainer.log  beat  progress
     checkpoints/step_000120/  resume_points/step_000120/  outcome.json (last of all)
Control: `control`, written by the worker. Secrets never lie here: they come by an inherited pipe.
"""

import json
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.grader_specs import PinnedGraderSpec
from core.options import Options

JOB, TRAIN, VALID, MODEL, RESUME = "job.json", "train.jsonl", "valid.jsonl", "model", "resume"
METRICS, EVENTS, SAMPLES, REWARDS = "metrics.jsonl", "events.jsonl", "samples.jsonl", "rewards.jsonl"
LOG, BEAT, PROGRESS, CONTROL, OUTCOME, LOCK = "trainer.log", "beat", "progress", "control", "outcome.json", "lock"
REWARD_MODELS = "reward_models"
CHECKPOINTS, RESUME_POINTS, MANIFEST = "checkpoints", "resume_points", "manifest.json"
SECRETS_FD = "--secrets-fd"
STATE_HASH = "state_sha256"
"""The fact of a manifest that says what SHA-256 weights and optimizer state had."""

VARIABLE_METRICS = ("seconds_", "tokens_per_second", "peak_memory_bytes", "grader_latency", "grader_attempts")
"""Beginnings of the names of metrics whose values differ between runs that are otherwise identical."""


class _Strict(BaseModel):
    """NaN and infinity are written as such: as `null` the reader would refuse the line, or take it for "none"."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class ModelSource(_Strict):
    """Where the weights come from; `model/` in the run directory is always a plain Hugging Face folder."""

    name: str
    digest: str
    """SHA-256 over the folder (`folder_digest`), checked before step 0. Empty: not pinned."""


class ResolvedJob(_Strict):
    """job.json: everything that the trainer needs, never a secret."""

    job_id: str
    attempt: int
    algorithm: str
    options: Options
    seed: int
    grader: PinnedGraderSpec = Field(discriminator="type")
    response_format: dict[str, Any] | None = None
    model: ModelSource
    num_threads: int = 0
    """0: leave torch's own choice."""
    allowed_private_networks: tuple[str, ...] = ()
    allow_http_graders: bool = False
    grader_patience_seconds: float = 0.0
    """How long a step waits for a grader that is away before the run pauses."""


class MetricsLine(_Strict):
    step: int
    phase: Literal["train", "valid"]
    values: dict[str, float]
    digest: str = ""
    total_steps: int = 0


class EventLine(_Strict):
    created_at: float
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = Field(default_factory=dict)


class SampleLine(_Strict):
    step: int
    phase: Literal["train", "valid"]
    prompt_index: int
    g: int
    prompt: str
    completion: str
    reward: float | None
    """None: not graded (failed or abstained), never 0 in its place."""
    sub_scores: dict[str, float] = Field(default_factory=dict)
    explanation: str | None = None
    advantage: float | None = None
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    grader_version: str
    attempts: int = 1
    latency_seconds: float = 0.0
    error: str | None = None
    error_message: str | None = None


class FileEntry(_Strict):
    name: str
    bytes: int
    sha256: str


class Manifest(_Strict):
    """manifest.json of a checkpoint or resume point: written last, so that its presence means "whole"."""

    kind: Literal["checkpoint", "resume_point"]
    step: int
    files: list[FileEntry]
    metrics: dict[str, float] = Field(default_factory=dict)
    """For a checkpoint: the step's train and, where evaluated, valid metrics (`valid_reward_mean`)."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """Weights format (`full` or `lora`), torch version, precision, digests, lengths of the output files."""


class End(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    """Asked to stop by `control` (pause or drain), or paused itself: see `pause_reason`."""


class Outcome(_Strict):
    """outcome.json: how the trainer ended, in its own words; written once, last of all."""

    end: End
    step: int
    """Steps done."""
    trained_tokens: int = 0
    final_checkpoint: str | None = None
    """Name of the folder below checkpoints/ that holds the final model."""
    pause_reason: str | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None
    retryable: bool = False


class Control(StrEnum):
    PAUSE = "pause"
    """Write a resume point and a checkpoint, then end `paused`."""
    DRAIN = "drain"
    """Write a resume point, then end `paused`: the worker is going down."""
    CANCEL = "cancel"


def step_folder(step: int) -> str:
    return f"step_{step:06d}"


def publish_json(path: Path, value: BaseModel) -> None:
    """Writes `value` aside, fsyncs file and folder and renames: a reader sees all of it or nothing."""
    publish_text(path, value.model_dump_json(indent=1))


def publish_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_outcome(run_directory: Path) -> Outcome | None:
    path = run_directory / OUTCOME
    return Outcome.model_validate_json(path.read_text()) if path.exists() else None


def read_control(run_directory: Path) -> Control | None:
    path = run_directory / CONTROL
    return Control(path.read_text().strip()) if path.exists() else None


def write_control(run_directory: Path, control: Control) -> None:
    publish_text(run_directory / CONTROL, control.value)


def published(run_directory: Path, kind: str) -> list[Path]:
    """The whole folders below `kind` (checkpoints or resume_points), oldest first. One that is still to be renamed is not among them."""
    folder = run_directory / kind
    return sorted(path.parent for path in folder.glob(f"step_*[0-9]/{MANIFEST}")) if folder.is_dir() else []


def read_manifest(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST).read_text())


def cut_torn_line(path: Path) -> None:
    """Removes what follows the last newline: the rest of a line that a killed writer left half done."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content_end = file.seek(0, os.SEEK_END)
        position = content_end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            position = start
        file.truncate(0)


class LineWriter:
    """Appends whole JSON lines to one file, each with a single write. `durable` adds an fsync per line."""

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        cut_torn_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the writer
        self._durable = durable

    def write(self, value: BaseModel) -> None:
        self.write_many([value])

    def write_many(self, values: list[Any]) -> None:
        """One write for all of `values` (models or plain dicts)."""
        lines = (value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value) for value in values)
        data = "".join(line + "\n" for line in lines).encode()
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def whole_lines(path: Path, offset: int, max_bytes: int = 4 * 1024 * 1024) -> tuple[list[bytes], int]:
    """Complete lines from byte `offset` on (about `max_bytes` at most) and the offset behind the last of them."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(max_bytes)
        while block and not block.endswith(b"\n") and b"\n" not in block:
            more = file.read(max_bytes)
            if not more:
                break
            block += more
    end = block.rfind(b"\n") + 1
    return block[:end].splitlines(), offset + end


def iter_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, raw line) of every line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line
