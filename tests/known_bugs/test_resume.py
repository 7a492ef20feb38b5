"""R24 (a killed run goes on as if nothing had been), R25 (the order of prompts), R26 (which resume point, and under which options).

Here a run is killed by an exception that nothing catches; `make test-resume` does it with SIGKILL.
"""

import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import TrainingError
from core.run_directory import (
    CHECKPOINTS,
    CONTROL,
    JOB,
    MANIFEST,
    RESUME,
    RESUME_POINTS,
    VARIABLE_METRICS,
    Control,
    End,
    ResolvedJob,
    published,
    write_control,
)
from graders.grade import GradeRequest
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, read_samples, train_here
from trainer import rollout as rollout_module
from trainer.checkpoints import LEARNER, ResumePoint, find_resume_point
from trainer.grading import GradingRound

GIVEN: dict[str, Any] = {
    "algorithm": "ppo",
    "max_steps": 4,
    "resume_point_interval": 1,
    "kl_coefficient": 0.05,
    "group_size": 2,
    "epochs_per_batch": 2,
    "learning_rate": 1e-2,
}


class Killed(BaseException):
    """What nothing in the trainer catches."""


def dying(function: Callable[..., Any], is_time: Callable[[], bool], *, after: bool = False) -> Callable[..., Any]:
    """`function`, which kills the run once it is time: before or after what it does."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if not after and is_time():
            raise Killed
        result = function(*arguments, **named)
        if after and is_time():
            raise Killed
        return result

    return wrapped


def kill_in(phase: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the run of `folder` in step 3, or while the resume point of step 3 is written."""
    is_step_3 = lambda: len(read_metrics(folder)) == 2  # noqa: E731
    is_saved = lambda: len(read_metrics(folder)) == 3  # noqa: E731
    calls: list[int] = []

    def third_time() -> bool:
        calls.append(1)
        return is_step_3() and len(calls) % 3 == 0

    if phase == "rollout":
        monkeypatch.setattr(rollout_module, "sample_tokens", dying(rollout_module.sample_tokens, third_time))
    elif phase == "grading":
        monkeypatch.setattr(GradingRound, "collect", dying(GradingRound.collect, is_step_3, after=True))
    elif phase == "update":
        monkeypatch.setattr(torch.optim.AdamW, "step", dying(torch.optim.AdamW.step, is_step_3, after=True))
    elif phase == "write":
        monkeypatch.setattr(torch, "save", half_saved(is_saved))
    else:
        monkeypatch.setattr(os, "replace", publish_dying(is_saved))


def half_saved(is_time: Callable[[], bool]) -> Callable[..., None]:
    save = torch.save

    def wrapped(value: Any, path: Path) -> None:
        save(value, path)
        if path.name == LEARNER and is_time():
            os.truncate(path, path.stat().st_size // 2)
            raise Killed

    return wrapped


def publish_dying(is_time: Callable[[], bool]) -> Callable[..., None]:
    replace = os.replace

    def wrapped(source: Any, target: Any) -> None:
        if Path(target).parent.name == RESUME_POINTS and is_time():
            raise Killed
        replace(source, target)

    return wrapped


class ForgetfulGrader(FunctionGrader):
    """Gives another grade when it is asked again for the same completion."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        super().__init__(self._grade)

    def _grade(self, request: GradeRequest) -> float:
        again = 5.0 if request.idempotency_key in self._asked else 0.0
        self._asked.add(request.idempotency_key)
        return letter_fraction(request) + again


def curve(folder: Path) -> list[tuple[int, dict[str, float], str]]:
    return [
        (line.step, {name: value for name, value in line.values.items() if not name.startswith(VARIABLE_METRICS)}, line.digest)
        for line in read_metrics(folder)
    ]


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(published(folder, CHECKPOINTS)[-1].glob("*.safetensors"))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run_directory(tmp_path_factory.mktemp("runs") / "whole", **GIVEN)
    assert train_here(folder).end is End.SUCCEEDED
    return folder


@pytest.mark.parametrize("phase", ["rollout", "grading", "update", "write", "publish"])
def test_r24_a_run_killed_in_any_phase_goes_on_bit_for_bit(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """NeMo-RL#108, slime#1695, trl#2657."""
    folder, grader = make_run_directory(tmp_path / "run", **GIVEN), ForgetfulGrader()
    with monkeypatch.context() as patches:
        kill_in(phase, folder, patches)
        with pytest.raises(Killed):
            train_here(folder, grader)
    assert published(folder, RESUME_POINTS)[-1].name == "step_000002"
    assert train_here(folder, grader).end is End.SUCCEEDED
    assert curve(folder) == curve(uninterrupted)
    assert weights(folder) == weights(uninterrupted)
    assert len(read_samples(folder)) == len(read_samples(uninterrupted))


@pytest.mark.parametrize("stops", [(5,), (4, 5), (6, 7)], ids=str)
def test_r25_prompts_come_in_the_same_order_after_every_resume(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """accelerate#3996 #4071 #4203 #4232 #4233, ms-swift#10050, KempnerForge#57.

    Five rows, three a step: step 4 spans epochs 1 and 2, step 5 lies within epoch 2, steps 6 and 7 in epoch 3.
    """
    given = {"rows": 5, "batch_size": 3, "group_size": 2, "max_steps": 8}
    whole, folder = (make_run_directory(tmp_path / name, **given) for name in ("whole", "stopped"))
    train_here(whole)
    for stop in stops:

        def drain(request: GradeRequest, stop: int = stop) -> float:
            if request.metadata["step"] == stop:
                write_control(folder, Control.DRAIN)
            return letter_fraction(request)

        assert train_here(folder, FunctionGrader(drain)).step == stop - 1
        (folder / CONTROL).unlink()
    assert train_here(folder).end is End.SUCCEEDED
    orders = [[(sample.step, sample.prompt_index) for sample in read_samples(run)] for run in (folder, whole)]
    assert orders[0] == orders[1]
    assert len(orders[0]) == 8 * 3 * 2


def test_r26_a_half_written_or_damaged_resume_point_is_never_used(tmp_path: Path) -> None:
    """prime-rl#1712."""
    folder = make_run_directory(tmp_path / "run", max_steps=3, resume_point_interval=1)
    train_here(folder)
    older, newer = published(folder, RESUME_POINTS)
    (newer / MANIFEST).unlink()
    assert published(folder, RESUME_POINTS) == [older]
    found = find_resume_point(folder)
    assert found is not None
    assert found.folder == older
    with open(older / "weights.pt", "r+b") as file:
        file.seek(500)
        file.write(b"\0\1\2\3")
    with pytest.raises(TrainingError, match="damaged"):
        ResumePoint(older)


@pytest.mark.parametrize(
    "change", [{"model": {"hidden": 64}}, {"lora_rank": 3}, {"finetuning": "full", "lora_rank": None}], ids=["model", "rank", "full"]
)
def test_r26_a_resume_point_of_another_model_or_configuration_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """NeMo-RL#415: what fitted was loaded, the rest began anew."""
    given = {"max_steps": 2, "resume_point_interval": 1, "finetuning": "lora", "lora_rank": 2}
    first = make_run_directory(tmp_path / "first", **given)
    train_here(first)
    second = make_run_directory(tmp_path / "second", **{**given, **change})
    shutil.copytree(published(first, RESUME_POINTS)[-1], second / RESUME)
    outcome = train_here(second)
    assert (outcome.end, outcome.code) == (End.FAILED, "resume_mismatch")


def test_r26_a_changed_learning_rate_is_kept_after_a_resume(tmp_path: Path) -> None:
    """labs-molt#130: the optimizer's state brought the old one back."""
    folder = make_run_directory(tmp_path / "run", algorithm="ppo", max_steps=3, resume_point_interval=1, learning_rate=1e-3, group_size=2)
    train_here(folder)
    job = ResolvedJob.model_validate_json((folder / JOB).read_text())
    options = job.options.model_copy(update={"learning_rate": 5e-3, "value_learning_rate": 7e-3, "max_steps": 4})
    (folder / JOB).write_text(job.model_copy(update={"options": options}).model_dump_json())
    assert train_here(folder).end is End.SUCCEEDED
    assert [line.values["learning_rate"] for line in read_metrics(folder)] == [1e-3, 1e-3, 5e-3, 5e-3]
