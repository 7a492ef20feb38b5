"""From grades to group statistics: R8 (missing grades), R9 (nothing to compare), R10 (every member counts), R11 (conventions)."""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.options import Options
from core.redaction import Redactor
from core.run_directory import CHECKPOINTS, MODEL, End, SampleLine
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.reply import parse_reply
from tests.trainer.handmade import group_advantages, make_batch
from tests.trainer.runs import FunctionGrader, make_run_directory, read_metrics, read_samples, train_here
from trainer.advantages import make_estimator
from trainer.policy import load_model

WEIGHTS = "model.safetensors"
LOST = {
    "null": parse_reply(b'{"score": null}', None, Redactor([])),
    "nan": parse_reply(b'{"score": NaN}', None, Redactor([])),
    "string": parse_reply(b'{"score": "0.9"}', None, Redactor([])),
    "timeout": failed(GradeFailure.TIMEOUT, "no answer"),
}


def by_group(folder: Path) -> list[list[SampleLine]]:
    samples = read_samples(folder)
    places = dict.fromkeys((sample.step, sample.prompt_index) for sample in samples)
    return [[sample for sample in samples if (sample.step, sample.prompt_index) == place] for place in places]


def advantages_by_hand(grades: list[float]) -> list[float]:
    return [(grade - statistics.fmean(grades)) / (statistics.stdev(grades) + 1e-4) for grade in grades]


def spread(request: GradeRequest) -> float:
    """Different for nearly all completions, and far from 0: an invented 0 would show."""
    return 1.0 + sum(map(ord, request.output_text)) % 97


def losing(grade: Grade) -> Callable[[GradeRequest], Grade | float]:
    """Every third completion or so is answered by `grade`."""
    return lambda request: grade if sum(map(ord, request.output_text)) % 3 == 0 else spread(request)


@pytest.mark.parametrize("lost", LOST)
def test_r08_a_missing_grade_changes_nothing_for_its_siblings(tmp_path: Path, lost: str) -> None:
    """trl#5902 #6426, ms-swift#8123: a missing grade entered mean and deviation, its sample trained with +0.264."""
    folder = make_run_directory(tmp_path / "run", max_steps=2, max_grader_failure_fraction=1.0)
    assert train_here(folder, FunctionGrader(losing(LOST[lost]))).end is End.SUCCEEDED
    groups = by_group(folder)
    assert len(groups) == 8
    for group in groups:
        graded = [sample for sample in group if sample.reward is not None]
        assert 2 <= len(graded) < len(group)
        expected = advantages_by_hand([sample.reward for sample in graded if sample.reward is not None])
        assert [sample.advantage for sample in graded] == pytest.approx(expected, rel=1e-5)
        assert all(sample.advantage is None for sample in group if sample.reward is None)


def test_r08_what_a_missing_grade_was_lost_to_makes_no_difference_to_the_weights(tmp_path: Path) -> None:
    weights = []
    for lost, grade in LOST.items():
        folder = make_run_directory(tmp_path / lost, max_steps=2, max_grader_failure_fraction=1.0)
        train_here(folder, FunctionGrader(losing(grade)))
        weights.append((folder / CHECKPOINTS / "step_000002" / WEIGHTS).read_bytes())
    assert len(set(weights)) == 1


def test_r08_a_row_that_does_not_count_has_no_advantage() -> None:
    found = group_advantages([0.0, 99.0, 1.0, 0.5], 4, counts=[True, False, True, True])
    assert found[1] == 0.0
    assert [found[0], *found[2:]] == pytest.approx(advantages_by_hand([0.0, 1.0, 0.5]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_r09_a_group_of_equal_grades_gets_exactly_0(scale: str, baseline: str) -> None:
    """A mean of equal floats need not be that float: 1e-17 over a deviation of 1e-17 is 1. unsloth#3006."""
    found = group_advantages([0.1, 0.1, 0.1, 0.3, 0.2, 0.7], 3, advantage_scale=scale, advantage_baseline=baseline)
    assert found[:3] == [0.0, 0.0, 0.0]
    assert all(found[3:])


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_r09_a_group_with_one_grade_is_left_out_whole_and_counted(baseline: str) -> None:
    """stable-baselines3#1028: the unbiased deviation of one number is NaN."""
    batch = make_batch([1.0, 0.0, 0.0, 1.0], [[1]] * 4, [0, 0, 1, 1], counts=[True, False, True, True])
    estimate = make_estimator(Options(kl_coefficient=0.0, advantage_baseline=baseline))(batch, 0.0)
    assert estimate.batch_counts.tolist() == [False, False, True, True]
    assert estimate.advantages[0].item() == 0.0
    assert torch.isfinite(estimate.advantages).all()
    assert estimate.statistics["underfilled_group_fraction"] == 0.5
    assert estimate.statistics["zero_variance_group_fraction"] == 0.0


def test_r09_a_batch_without_a_grade_skips_its_optimizer_steps_and_counts_them(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=2, minibatches_per_batch=2, kl_coefficient=0.1, weight_decay=0.1)
    outcome = train_here(folder, FunctionGrader(lambda request: Grade(reward=None, abstained=True)))
    assert outcome.end is End.SUCCEEDED
    assert [line.values["skipped_optimizer_steps"] for line in read_metrics(folder)] == [2.0, 2.0]
    assert same_weights(folder / MODEL, folder / CHECKPOINTS / "step_000002")


@pytest.mark.parametrize("given", [{}, {"epochs_per_batch": 2, "minibatches_per_batch": 2}], ids=str)
def test_r09_a_batch_of_equal_grades_moves_nothing_and_is_counted(tmp_path: Path, given: dict[str, int]) -> None:
    """Not by momentum or weight decay either."""
    folder = make_run_directory(tmp_path / "run", max_steps=2, checkpoint_interval=1, weight_decay=0.1, **given)
    grader = FunctionGrader(lambda request: spread(request) if request.metadata["step"] == 1 else 0.1)
    assert train_here(folder, grader).end is End.SUCCEEDED
    first, second = (line.values for line in read_metrics(folder))
    assert (first["zero_variance_group_fraction"], second["zero_variance_group_fraction"]) == (0.0, 1.0)
    assert (first["skipped_optimizer_steps"], second["skipped_optimizer_steps"]) == (0.0, 4.0 if given else 1.0)
    assert (second["loss"], second["policy_loss"]) == (0.0, 0.0)
    assert second["entropy"] > 0
    checkpoints = [folder / CHECKPOINTS / f"step_00000{step}" for step in (1, 2)]
    assert not same_weights(folder / MODEL, checkpoints[0])
    assert same_weights(*checkpoints)


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_model(folder).state_dict() for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_r10_all_members_of_a_group_enter_its_mean_and_deviation(tmp_path: Path) -> None:
    """PipelineRL#54: only the first rollout of each group did."""
    folder = make_run_directory(tmp_path / "run", max_steps=1, group_size=5)
    train_here(folder, FunctionGrader(spread))
    groups = by_group(folder)
    assert [len(group) for group in groups] == [5] * 4
    for group in groups:
        expected = advantages_by_hand([sample.reward or 0.0 for sample in group])
        assert [sample.advantage for sample in group] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("member", range(4))
def test_r10_changing_any_grade_changes_the_advantages_of_all_others(member: int) -> None:
    rewards = [0.0, 1.0, 2.0, 4.0]
    before = group_advantages(rewards, 4)
    rewards[member] += 3.0
    after = group_advantages(rewards, 4)
    assert all(before[other] != after[other] for other in range(4) if other != member)


def test_r11_leave_one_out_equals_brute_force() -> None:
    rewards = [0.1, 0.7, 0.4, 0.9, 0.2]
    expected = [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    assert group_advantages(rewards, 5, advantage_baseline="leave_one_out", advantage_scale="none") == pytest.approx(expected)


def test_r11_the_scale_of_a_group_is_its_bessel_deviation() -> None:
    """AReaL changed the default between two versions; here it is n - 1."""
    rewards = [0.0, 1.0, 1.0, 4.0, 2.0, 2.5, 2.5, 2.5]
    found = group_advantages(rewards, 4)
    assert found == pytest.approx([*advantages_by_hand(rewards[:4]), *advantages_by_hand(rewards[4:])])


def test_r11_the_scale_of_a_batch_is_the_bessel_deviation_of_all_centred_rewards() -> None:
    centred = [-0.5, 0.5, -2.0, 2.0]
    expected = [value / (statistics.stdev(centred) + 1e-4) for value in centred]
    assert group_advantages([0.0, 1.0, 5.0, 9.0], 2, advantage_scale="batch") == pytest.approx(expected)
