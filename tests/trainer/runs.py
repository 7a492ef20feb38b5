"""Run directories around the tiny model, and graders that live in the test's own process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.grader_specs import StringCheckGrader
from core.presets import resolve_options
from core.run_directory import (
    JOB,
    METRICS,
    MODEL,
    SAMPLES,
    TRAIN,
    VALID,
    MetricsLine,
    ModelSource,
    Outcome,
    ResolvedJob,
    SampleLine,
    publish_json,
)
from graders.grade import Grade, GradeRequest
from tests.tiny import build_tiny_model
from trainer.control import ControlReader, Pulse
from trainer.loop import run_job
from trainer.session import MakeGrader

LETTERS = "abcdefgh"
COMMON = {
    "finetuning": "full",
    "precision": "float32",
    "max_completion_tokens": 8,
    "batch_size": 4,
    "kl_coefficient": 0.0,
    "learning_rate": 3e-3,
}


class FunctionGrader:
    """Grades by a function of the request; nothing leaves the process."""

    def __init__(self, function: Callable[[GradeRequest], Grade | float]) -> None:
        self._function = function
        self.requests: list[GradeRequest] = []

    async def grade(self, request: GradeRequest) -> Grade:
        self.requests.append(request)
        answer = self._function(request)
        return answer if isinstance(answer, Grade) else Grade(reward=answer)

    async def close(self) -> None:
        pass

    @property
    def maker(self) -> MakeGrader:
        return lambda spec, secrets, network: self


def letter_fraction(request: GradeRequest) -> float:
    """How much of the completion is the letter that the row asks for."""
    text = request.output_text
    return text.count(request.item["letter"]) / 8 if text else 0.0


def letter_rows(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": LETTERS[i % 8]}], "letter": LETTERS[i % 8]} for i in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run_directory(
    folder: Path,
    *,
    algorithm: str = "grpo",
    seed: int = 1,
    rows: int = 10,
    valid_rows: int = 0,
    model: dict[str, Any] | None = None,
    train_rows: list[dict[str, Any]] | None = None,
    attempt: int = 1,
    **options: Any,
) -> Path:
    """A whole run directory: job.json, train.jsonl, valid.jsonl and a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    job = ResolvedJob(
        job_id="ftjob-test",
        attempt=attempt,
        algorithm=algorithm,
        options=resolve_options(algorithm, {**COMMON, **options}),
        seed=seed,
        grader=StringCheckGrader(type="string_check", input="{{sample.output_text}}", reference="{{item.letter}}", operation="ilike"),
        model=ModelSource(name="tiny", digest=""),
        num_threads=1,
    )
    publish_json(folder / JOB, job)
    write_rows(folder / TRAIN, letter_rows(rows) if train_rows is None else train_rows)
    if valid_rows:
        write_rows(folder / VALID, letter_rows(valid_rows))
    build_tiny_model(folder / MODEL, seed=seed, **(model or {"hidden": 32}))
    return folder


def train_here(folder: Path, grader: FunctionGrader | None = None, control: ControlReader | None = None) -> Outcome:
    """Runs the trainer in this process, graded by `letter_fraction` unless told otherwise."""
    pulse = Pulse(folder)
    try:
        reader = control or ControlReader(folder, pulse)
        return run_job(folder, {}, reader, pulse, (grader or FunctionGrader(letter_fraction)).maker)
    finally:
        pulse.stop()


def read_metrics(folder: Path, phase: str = "train") -> list[MetricsLine]:
    lines = [MetricsLine.model_validate_json(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line for line in lines if line.phase == phase]


def read_samples(folder: Path, phase: str = "train") -> list[SampleLine]:
    lines = [SampleLine.model_validate_json(line) for line in (folder / SAMPLES).read_text().splitlines()]
    return [line for line in lines if line.phase == phase]
