import itertools
import math
import statistics
from pathlib import Path

import pytest

from core.run_directory import End
from tests.trainer.runs import make_run_directory, read_metrics, read_samples, train_here
from trainer.batch import Graded, Prompt, Rollout
from trainer.evaluation import half_width, pass_at_k, summarise


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 1), (4, 1, 2), (5, 3, 2), (4, 4, 4), (3, 2, 9)])
def test_pass_at_k_equals_the_share_of_all_subsets_with_a_pass(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), min(k, n)))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_half_width_is_1_96_standard_errors_of_the_row_means() -> None:
    assert half_width([0.0, 1.0, 1.0, 0.0]) == pytest.approx(1.96 * statistics.stdev([0, 1, 1, 0]) / 2)
    assert half_width([1.0]) == 0.0


def graded(index: int, g: int, reward: float | None, error: str | None = None) -> Graded:
    return Graded(Rollout(Prompt(index, (1,), "", {}), g, (1, 2), (0.0, 0.0), "stop", ""), reward, error=error)


def test_means_are_over_graded_completions_and_a_failure_is_no_zero() -> None:
    sampled = [graded(0, 0, 1.0), graded(0, 1, None, "grader_timeout"), graded(1, 0, 0.0), graded(1, 1, 0.5)]
    found = summarise(sampled, [graded(0, 0, 1.0), graded(1, 0, 0.25)], 2, threshold=0.5)
    assert found["valid_reward_mean"] == pytest.approx(0.5)
    assert found["valid_greedy_reward_mean"] == pytest.approx(0.625)
    assert found["valid_grader_failure_fraction"] == 0.25
    assert found["pass_at_1"] == pytest.approx((1 + 0.5) / 2)
    assert found["pass_at_k"] == 1.0
    assert found["valid_reward_half_width"] == pytest.approx(1.96 * statistics.stdev([1.0, 0.25]) / math.sqrt(2))


def test_nothing_graded_gives_no_score() -> None:
    assert "valid_reward_mean" not in summarise([graded(0, 0, None, "x")], [graded(0, 0, None, "x")], 1, 1.0)


def test_evaluations_happen_before_the_first_step_at_intervals_and_at_the_end_with_the_same_draws(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", valid_rows=3, max_steps=5, eval_interval=2, eval_samples=2, learning_rate=1e-12)
    assert train_here(folder).end is End.SUCCEEDED
    assert [line.step for line in read_metrics(folder, "valid")] == [0, 2, 4, 5]
    samples = read_samples(folder, "valid")
    by_step = [[(s.prompt_index, s.g, s.completion) for s in samples if s.step == step] for step in (0, 2, 4, 5)]
    assert [(index, g) for index, g, _ in by_step[0]] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert by_step[0] == by_step[1] == by_step[2] == by_step[3]
    assert len({completion for *_, completion in by_step[0]}) > 1
    trained = {(s.prompt_index, s.g): s.completion for s in read_samples(folder) if s.step == 1}
    assert [completion for index, g, completion in by_step[0]] != [trained.get((index, g)) for index, g, _ in by_step[0]]


def test_checkpoints_carry_the_evaluation_of_their_own_step(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", valid_rows=3, max_steps=3, eval_interval=3, checkpoint_interval=2)
    train_here(folder)
    manifests = {path.parent.name: path.read_text() for path in folder.glob("checkpoints/*/manifest.json")}
    assert "valid_reward_mean" not in manifests["step_000002"]
    assert "valid_reward_mean" in manifests["step_000003"]
