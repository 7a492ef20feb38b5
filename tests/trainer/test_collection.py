"""What a step is trained on: rollouts sampled ahead, silent groups replaced, long completions punished; and when a run ends early."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from core.options import Options
from core.run_directory import CHECKPOINTS, EVENTS, RESUME, RESUME_POINTS, REWARDS, End, published, read_manifest
from graders.grade import Grade, GradeRequest
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, read_samples, train_here
from trainer.batch import Prompt, Rollout, Support
from trainer.collection import Pending, from_plain, to_plain
from trainer.data import overlong_penalty
from trainer.random import Purpose
from trainer.rollout import RolloutEngine
from trainer.update import Learner

STALE = {"max_staleness": 1, "max_steps": 4}


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of generations and updates of the runs that follow."""
    made: list[str] = []
    generate, update = RolloutEngine.generate, Learner.update

    def noted_generate(self: RolloutEngine, *arguments: Any, **named: Any) -> list[Rollout]:
        if arguments[2].purpose == Purpose.ROLLOUT:
            made.append(f"generate {arguments[2].step}")
        return generate(self, *arguments, **named)

    def noted_update(self: Learner, *arguments: Any) -> dict[str, float]:
        made.append(f"update {arguments[3]}")
        return update(self, *arguments)

    monkeypatch.setattr(RolloutEngine, "generate", noted_generate)
    monkeypatch.setattr(Learner, "update", noted_update)
    return made


def test_with_staleness_1_each_batch_is_sampled_before_the_update_in_front_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calls(monkeypatch)
    folder = make_run_directory(tmp_path / "run", **STALE)
    assert train_here(folder).end is End.SUCCEEDED
    assert made == ["generate 1", "generate 2", "update 1", "generate 3", "update 2", "generate 4", "update 3", "update 4"]
    assert [line.values["weight_lag"] for line in read_metrics(folder)] == [0.0, 1.0, 1.0, 1.0]


def test_without_staleness_no_batch_is_older_than_the_last_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(monkeypatch)
    folder = make_run_directory(tmp_path / "run", max_steps=2)
    train_here(folder)
    assert made == ["generate 1", "update 1", "generate 2", "update 2"]
    assert [line.values["weight_lag"] for line in read_metrics(folder)] == [0.0, 0.0]


def test_a_stale_batch_is_weighed_against_the_weights_that_sampled_it(tmp_path: Path) -> None:
    """Its ratio is not 1 on the first pass, while the sampler and the old log-probs agree: both are of the older weights."""
    folder = make_run_directory(tmp_path / "run", **STALE, learning_rate=1e-2)
    train_here(folder)
    ratios = [line.values["ratio_max"] for line in read_metrics(folder)]
    assert ratios[0] == pytest.approx(1.0, abs=1e-4)
    assert all(ratio > 1.01 for ratio in ratios[1:])
    assert all(line.values["sampler_mismatch_kl"] < 1e-8 for line in read_metrics(folder))


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_resume_with_rollouts_sampled_ahead_is_the_same_run(tmp_path: Path, algorithm: str, top_p: float) -> None:
    options = {**STALE, "algorithm": algorithm, "resume_point_interval": 2, "top_p": top_p}
    whole = make_run_directory(tmp_path / "whole", **options)
    train_here(whole)
    part = make_run_directory(tmp_path / "part", **options)
    shutil.copytree(whole / RESUME_POINTS / "step_000002", part / RESUME)
    asked = FunctionGrader(letter_fraction)
    train_here(part, asked)
    assert [line.digest for line in read_metrics(part)] == [line.digest for line in read_metrics(whole)][2:]
    finals = [read_manifest(folder / CHECKPOINTS / "step_000004").facts["state_sha256"] for folder in (whole, part)]
    assert finals[0] == finals[1]
    assert {request.metadata["step"] for request in asked.requests} <= {3, 4}


def test_what_the_grader_answered_ahead_is_not_asked_again(tmp_path: Path) -> None:
    def grade(request: GradeRequest) -> Grade | float:
        return Grade(reward=None, error="grader_timeout") if request.metadata["step"] == 2 else letter_fraction(request)

    folder = make_run_directory(tmp_path / "run", **STALE)
    first = FunctionGrader(grade)
    outcome = train_here(folder, first)
    assert (outcome.end, outcome.step, outcome.pause_reason) == (End.PAUSED, 1, "grader_unavailable")
    answered = {line["key"] for line in map(json.loads, (folder / REWARDS).read_text().splitlines()) if line.get("step") == 3}
    second = FunctionGrader(letter_fraction)
    assert train_here(folder, second).end is End.SUCCEEDED
    again = [request for request in second.requests if request.metadata["step"] == 3]
    assert len(again) == 32 - len(answered)
    undisturbed = make_run_directory(tmp_path / "other", **STALE)
    train_here(undisturbed)
    assert [line.digest for line in read_metrics(folder)] == [line.digest for line in read_metrics(undisturbed)]


def test_pending_rollouts_survive_their_plain_form() -> None:
    prompt = Prompt(3, (1, 2), "p", {})
    support = Support.of([torch.tensor([4, 5]), torch.tensor([1])])
    rollout = Rollout(prompt, 2, (5, 1), (-0.1, 0.1 + 0.2), "stop", "x", support)

    class Collecting:
        prompts = (None, None, None, prompt)

        def submit(self, step: int, rollouts: list[Rollout]) -> str:
            return f"verdicts of {step}"

    pending = Pending(7, [rollout], "unused", 1, torch.ones(1, 2))  # type: ignore[arg-type]
    found = from_plain(to_plain(pending), Collecting())  # type: ignore[arg-type]
    assert found.rollouts == [rollout]
    assert (found.step, found.weight_lag, found.verdicts) == (7, 1, "verdicts of 7")


def only_even_rows(request: GradeRequest) -> float:
    """Rows of odd letters give the same grade to everything."""
    return letter_fraction(request) + len(request.output_text) if request.item["letter"] in "aceg" else 0.0


def test_silent_groups_give_way_to_groups_of_rows_that_the_step_has_not_tried(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": letter}], "letter": letter} for letter in "abcdefgh"]
    folder = make_run_directory(tmp_path / "run", train_rows=rows, max_steps=1, dynamic_sampling=4)
    train_here(folder, FunctionGrader(only_even_rows))
    values = read_metrics(folder)[0].values
    samples = read_samples(folder)
    trained = {sample.prompt_index for sample in samples if sample.advantage is not None}
    assert trained == {0, 2, 4, 6}
    assert len(samples) == len({(sample.prompt_index, sample.g) for sample in samples})
    tried = {sample.prompt_index for sample in samples}
    assert values["zero_variance_group_fraction"] == 0.0
    assert 1 <= values["dynamic_sampling_rounds"] <= 4
    assert values["replaced_group_fraction"] == pytest.approx(1 - 4 / len(tried))
    rewards = [sample.reward for sample in samples]
    assert values["reward_mean"] == pytest.approx(sum(r for r in rewards if r is not None) / len(rewards))


def test_the_rounds_of_dynamic_sampling_are_bounded_and_what_is_left_stays(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", rows=40, max_steps=1, dynamic_sampling=2)
    grader = FunctionGrader(lambda request: 1.0)
    assert train_here(folder, grader).end is End.SUCCEEDED
    values = read_metrics(folder)[0].values
    assert len(grader.requests) == 3 * 32
    assert (values["dynamic_sampling_rounds"], values["zero_variance_group_fraction"]) == (2.0, 1.0)


def test_dynamic_sampling_ends_when_no_row_is_left_to_try(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", rows=6, max_steps=1, dynamic_sampling=16)
    grader = FunctionGrader(lambda request: 1.0)
    train_here(folder, grader)
    assert len(grader.requests) == 6 * 8


def test_dynamic_sampling_resumes_as_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": 16, "max_steps": 4, "dynamic_sampling": 2, "resume_point_interval": 2}
    whole = make_run_directory(tmp_path / "whole", **options)
    train_here(whole, FunctionGrader(only_even_rows))
    part = make_run_directory(tmp_path / "part", **options)
    shutil.copytree(whole / RESUME_POINTS / "step_000002", part / RESUME)
    train_here(part, FunctionGrader(only_even_rows))
    assert [line.digest for line in read_metrics(part)] == [line.digest for line in read_metrics(whole)][2:]


@pytest.mark.parametrize(("num_tokens", "penalty"), [(1, 0.0), (16, 0.0), (18, 0.5), (20, 1.0)])
def test_the_overlong_penalty_is_the_line_of_the_dapo_paper(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, Options(overlong_penalty=0.2, max_completion_tokens=20)) == pytest.approx(penalty)
    assert overlong_penalty(num_tokens, Options(max_completion_tokens=20)) == 0.0


def test_the_overlong_penalty_changes_what_is_trained_on_and_not_what_is_reported(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=1, overlong_penalty=0.5, advantage_scale="none")
    train_here(folder, FunctionGrader(lambda request: 1.0))
    samples, values = read_samples(folder), read_metrics(folder)[0].values
    assert {sample.reward for sample in samples} == {1.0}
    assert (values["reward_mean"], values["reward_std"]) == (1.0, 0.0)
    penalties = {(sample.prompt_index, sample.g): max(0.0, (sample.num_tokens - 4) / 4) for sample in samples}
    assert values["overlong_penalty_mean"] == pytest.approx(sum(penalties.values()) / len(penalties))
    for sample in samples:
        group = [penalties[sample.prompt_index, g] for g in range(8)]
        assert sample.advantage == pytest.approx(sum(group) / 8 - penalties[sample.prompt_index, sample.g], abs=1e-6)


def read_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


EVALUATED: dict[str, Any] = {"valid_rows": 2, "eval_interval": 1, "max_steps": 9, "checkpoint_interval": 9}


def rising_until_step_3(request: GradeRequest) -> float:
    return float(min(request.metadata["step"], 3))


@pytest.mark.parametrize(("option", "value", "last"), [("target_reward", 2.0, 2), ("patience", 2, 5)])
def test_a_run_ends_early_succeeded_with_a_checkpoint_and_says_why(tmp_path: Path, option: str, value: float, last: int) -> None:
    folder = make_run_directory(tmp_path / "run", **EVALUATED, **{option: value})
    outcome = train_here(folder, FunctionGrader(rising_until_step_3))
    assert (outcome.end, outcome.step, outcome.final_checkpoint) == (End.SUCCEEDED, last, f"step_{last:06d}")
    assert [path.name for path in published(folder, CHECKPOINTS)] == [f"step_{last:06d}"]
    (event,) = [event for event in read_events(folder) if event["data"].get("code") == "ended_early"]
    assert option in event["message"]


def test_a_target_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", **EVALUATED, target_reward=3.5)
    assert train_here(folder, FunctionGrader(rising_until_step_3)).step == 9


def test_patience_counts_on_across_a_resume(tmp_path: Path) -> None:
    options = {**EVALUATED, "patience": 3, "resume_point_interval": 4}
    whole = make_run_directory(tmp_path / "whole", **options)
    assert train_here(whole, FunctionGrader(rising_until_step_3)).step == 6
    part = make_run_directory(tmp_path / "part", **options)
    shutil.copytree(whole / RESUME_POINTS / "step_000004", part / RESUME)
    assert train_here(part, FunctionGrader(rising_until_step_3)).step == 6


def test_an_evaluation_that_nobody_graded_is_no_best_and_forgets_none(tmp_path: Path) -> None:
    def grade(request: GradeRequest) -> Grade | float:
        return Grade(reward=None, abstained=True) if request.metadata["step"] == 3 else float(request.metadata["step"] == 1)

    folder = make_run_directory(tmp_path / "run", **EVALUATED, patience=3)
    assert train_here(folder, FunctionGrader(grade)).step == 5


@pytest.mark.parametrize("option", ["target_reward", "patience"])
def test_an_early_end_without_validation_rows_is_refused_with_its_option(tmp_path: Path, option: str) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=1, **{option: 1})
    outcome = train_here(folder)
    assert (outcome.end, outcome.param) == (End.FAILED, option)
