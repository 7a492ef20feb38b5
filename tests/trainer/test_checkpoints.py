import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from core.run_directory import (
    CHECKPOINTS,
    JOB,
    MANIFEST,
    METRICS,
    MODEL,
    RESUME,
    RESUME_POINTS,
    REWARDS,
    SAMPLES,
    TRAIN,
    VALID,
    VARIABLE_METRICS,
    Control,
    End,
    published,
    read_manifest,
    write_control,
)
from graders.grade import GradeRequest
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, read_samples, train_here
from trainer.checkpoints import Progress, save_checkpoint, save_resume_point, state_digest

CASES = [
    ("grpo", {"kl_coefficient": 0.05, "minibatches_per_batch": 2, "epochs_per_batch": 2, "microbatch_tokens": 64}),
    ("grpo", {"finetuning": "lora", "lora_rank": 4, "kl_coefficient": 0.05, "learning_rate": 1e-2, "kl_target": 0.1, "kl_horizon": 50}),
    ("ppo", {"kl_coefficient": 0.01, "group_size": 2, "epochs_per_batch": 2, "lr_schedule": "cosine", "warmup_steps": 2}),
    ("ppo", {"value_model": "shared_backbone", "group_size": 2, "value_warmup_steps": 1, "truncation_bootstrap": True}),
]


def stop_at(step: int, folder: Path, control: Control) -> Callable[[GradeRequest], float]:
    """Grades as usual and asks for a stop in the middle of step `step`."""

    def grade(request: GradeRequest) -> float:
        if request.metadata["step"] == step and len(request.output_text) > 2:
            write_control(folder, control)
        return letter_fraction(request)

    return grade


def successor(old: Path, new: Path, point: Path) -> Path:
    """The directory of the next attempt, as a worker makes it."""
    new.mkdir()
    for name in (JOB, TRAIN, VALID):
        if (old / name).exists():
            shutil.copy(old / name, new / name)
    shutil.copytree(old / MODEL, new / MODEL)
    shutil.copytree(point, new / RESUME)
    return new


def comparable_metrics(folder: Path, phase: str) -> list[tuple[int, dict[str, float], str]]:
    return [
        (line.step, {name: value for name, value in line.values.items() if not name.startswith(VARIABLE_METRICS)}, line.digest)
        for line in read_metrics(folder, phase)
    ]


def weights(folder: Path) -> dict[str, str]:
    (last,) = [path for path in published(folder, CHECKPOINTS) if path.name == "step_000004"]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(last.glob("*.safetensors"))}


@pytest.mark.parametrize(("algorithm", "options"), CASES)
def test_two_steps_then_resume_then_two_steps_equal_four_steps_bit_for_bit(
    tmp_path: Path, algorithm: str, options: dict[str, object]
) -> None:
    given = {"algorithm": algorithm, "max_steps": 4, "valid_rows": 2, "eval_interval": 2, **options}
    whole = make_run_directory(tmp_path / "whole", **given)
    assert train_here(whole).end is End.SUCCEEDED
    first = make_run_directory(tmp_path / "first", **given)
    outcome = train_here(first, FunctionGrader(stop_at(3, first, Control.DRAIN)))
    assert (outcome.end, outcome.step) == (End.PAUSED, 2)
    (point,) = published(first, RESUME_POINTS)
    second = successor(first, tmp_path / "second", point)
    assert train_here(second).end is End.SUCCEEDED
    assert weights(second) == weights(whole)
    for phase in ("train", "valid"):
        assert comparable_metrics(first, phase) + comparable_metrics(second, phase) == comparable_metrics(whole, phase)
        samples = [
            [(s.step, s.prompt_index, s.g, s.completion, s.reward, s.advantage) for s in read_samples(folder, phase)]
            for folder in (first, second, whole)
        ]
        assert samples[0] + samples[1] == samples[2]


def test_a_crashed_run_started_again_in_its_own_directory_repeats_nothing_and_doubles_no_line(tmp_path: Path) -> None:
    given = {"max_steps": 4, "resume_point_interval": 2}
    whole = make_run_directory(tmp_path / "whole", **given)
    train_here(whole)
    folder = make_run_directory(tmp_path / "crashing", **given)

    def crash_in_step_4(request: GradeRequest) -> float:
        if request.metadata["step"] == 4:
            raise RuntimeError("a bug")
        return letter_fraction(request)

    assert train_here(folder, FunctionGrader(crash_in_step_4)).code == "trainer_crashed"
    with open(folder / METRICS, "a") as file:
        file.write('{"torn')
    assert train_here(folder).end is End.SUCCEEDED
    assert [line.step for line in read_metrics(folder)] == [1, 2, 3, 4]
    assert [line.digest for line in read_metrics(folder)] == [line.digest for line in read_metrics(whole)]
    assert (folder / SAMPLES).read_text().count("\n") == (whole / SAMPLES).read_text().count("\n")


def test_a_resumed_step_asks_no_grader_for_what_was_answered(tmp_path: Path) -> None:
    first = make_run_directory(tmp_path / "first", max_steps=2)
    grader = FunctionGrader(stop_at(2, first, Control.PAUSE))
    train_here(first, grader)
    asked_first = {request.idempotency_key for request in grader.requests if request.metadata["step"] == 2}
    journaled = {json.loads(line)["key"] for line in (first / REWARDS).read_text().splitlines()}
    second = successor(first, tmp_path / "second", published(first, RESUME_POINTS)[-1])
    again = FunctionGrader(letter_fraction)
    train_here(second, again)
    asked_again = {request.idempotency_key for request in again.requests}
    assert not asked_first & asked_again
    assert len(asked_first | asked_again) == 32
    assert len(journaled) >= 32 + len(asked_first)


def test_a_resume_on_another_machine_goes_on_and_says_that_it_is_not_exact(tmp_path: Path) -> None:
    first = make_run_directory(tmp_path / "first", max_steps=2, resume_point_interval=1)
    train_here(first)
    point = published(first, RESUME_POINTS)[0]
    second = successor(first, tmp_path / "second", point)
    manifest = read_manifest(second / RESUME)
    elsewhere = manifest.model_copy(update={"facts": {**manifest.facts, "torch": "1.0"}})
    (second / RESUME / MANIFEST).write_text(elsewhere.model_dump_json())
    assert train_here(second).end is End.SUCCEEDED
    warnings = [json.loads(line) for line in (second / "events.jsonl").read_text().splitlines() if '"warn"' in line]
    assert [event["data"] for event in warnings] == [{"code": "resume_not_exact", "differing": ["torch"]}]


def test_only_the_two_newest_resume_points_stay_on_disk(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_resume_point(tmp_path, Progress(step=step), {"policy.w": torch.ones(2)}, {}, None, [], {})
    assert [path.name for path in published(tmp_path, RESUME_POINTS)] == ["step_000003", "step_000004"]


def test_the_manifest_lists_every_file_with_its_size_and_digest(tmp_path: Path) -> None:
    def write(folder: Path) -> str:
        (folder / "a.txt").write_text("abc")
        return "full"

    folder = save_checkpoint(tmp_path, 7, write, {"reward_mean": 0.5}, {"torch": "x"})
    manifest = read_manifest(folder)
    assert (manifest.kind, manifest.step, manifest.metrics, manifest.facts["format"]) == ("checkpoint", 7, {"reward_mean": 0.5}, "full")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc", FIPS 180-2
    assert [(entry.name, entry.bytes, entry.sha256) for entry in manifest.files] == [("a.txt", 3, digest)]


def test_state_digest_sees_every_bit_and_every_name() -> None:
    state = {"a": torch.tensor([1.0, 2.0]), "b": {"step": torch.tensor(3.0), "lr": 0.1}}
    changed = {"a": torch.tensor([1.0, 2.0000002]), "b": state["b"]}
    renamed = {"x": state["a"], "b": state["b"]}
    assert len({state_digest(state), state_digest(changed), state_digest(renamed)}) == 3
    assert state_digest(state) == state_digest({"a": state["a"].clone(), "b": state["b"]})
