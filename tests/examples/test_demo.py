import math
import random
import statistics
from typing import Any

import pytest

from core.presets import resolve_options
from core.specs import parse_job_request
from examples.demo import settings
from examples.demo.__main__ import judge, make_method
from examples.demo.comparison import Comparison, compare, row_rewards
from examples.demo.programs import DemoFailed
from examples.demo.progress import Progress
from examples.demo.prompts import as_jsonl, check_split, make_row, make_rows, text_of
from examples.demo.report import printable, score_lines


def sample(index: int, g: int, reward: float | None) -> dict[str, Any]:
    return {"prompt_index": index, "g": g, "reward": reward, "completion": "", "error": None}


def test_rows_are_distinct_disjoint_right_and_the_same_each_time() -> None:
    training, held_out = make_rows()
    assert (len(training), len(held_out)) == (settings.NUM_TRAINING, settings.NUM_HELD_OUT)
    assert len({text_of(row) for row in training + held_out}) == len(training) + len(held_out)
    for row in training + held_out:
        left, right = text_of(row).removeprefix("What is ").partition("?")[0].split(" + ")
        assert int(left) + int(right) == int(row["answer"])
    assert make_rows() == (training, held_out)
    assert as_jsonl(held_out).count(b"\n") == len(held_out)


def test_split_with_a_question_in_both_parts_is_refused() -> None:
    training, held_out = make_rows()
    with pytest.raises(AssertionError, match="no held-out question"):
        check_split([*training[:-1], held_out[0]], held_out)
    with pytest.raises(AssertionError, match="held-out rows must be distinct"):
        check_split(training, [*held_out[:-1], held_out[0]])
    with pytest.raises(AssertionError, match="training rows must be distinct"):
        check_split([make_row("1 + 1", "2")] * 1200, held_out)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("steps", [None, 2])
def test_what_the_demo_submits_is_a_job_that_the_platform_takes(algorithm: str, steps: int | None) -> None:
    method = make_method("grader_abc123", algorithm, steps)
    request = parse_job_request({"model": "m", "training_file": "file-1", "method": method})
    options = resolve_options(algorithm, request.method.reinforcement.hyperparameters.model_dump())
    assert options.eval_samples == settings.EVAL_SAMPLES
    assert options.eval_interval == options.max_steps
    assert steps is None or options.max_steps == steps


def test_interval_covers_the_true_difference_about_19_times_in_20() -> None:
    """Independent check of the formula: rows of four coin flips whose chances are known."""
    generator = random.Random(0)
    hits, trials = 0, 400
    for _ in range(trials):
        before = {row: statistics.fmean(generator.random() < 0.1 for _ in range(4)) for row in range(128)}
        after = {row: statistics.fmean(generator.random() < 0.5 for _ in range(4)) for row in range(128)}
        found = compare(before, after)
        hits += found.lower <= 0.4 <= found.upper
    assert 0.92 <= hits / trials <= 0.98


def test_pairing_by_row_counts_rows_not_completions() -> None:
    found = compare({0: 0.0, 1: 0.5, 2: 1.0}, {0: 0.5, 1: 0.75, 2: 1.0})
    assert found.num_rows == 3
    assert found.rise == pytest.approx(0.25)
    half = 1.959964 * math.sqrt(((0.25**2) * 2) / 2) / math.sqrt(3)
    assert (found.lower, found.upper) == (pytest.approx(0.25 - half), pytest.approx(0.25 + half))
    with pytest.raises(DemoFailed, match="different rows"):
        compare({0: 0.0, 1: 0.0}, {0: 0.0, 2: 0.0})


def test_ungraded_and_missing_completions_are_not_counted_as_zero() -> None:
    assert row_rewards([sample(0, 0, 1.0), sample(0, 1, 0.0)], 2) == {0: 0.5}
    with pytest.raises(DemoFailed, match="without a grade"):
        row_rewards([sample(0, 0, 1.0), sample(0, 1, None)], 2)
    with pytest.raises(DemoFailed, match="without 2 graded"):
        row_rewards([sample(0, 0, 1.0)], 2)
    with pytest.raises(DemoFailed):
        row_rewards([], 2)


@pytest.mark.parametrize(
    ("algorithm", "rise", "lower", "passes"),
    [
        ("grpo", 0.30, 0.2, True),
        ("grpo", 0.24, 0.2, False),
        ("ppo", 0.12, 0.05, True),
        ("ppo", 0.09, 0.05, False),
        ("ppo", 0.12, 0.0, False),
    ],
)
def test_demo_passes_only_with_a_large_and_certain_rise(algorithm: str, rise: float, lower: float, passes: bool) -> None:
    comparison = Comparison(before=0.1, after=0.1 + rise, lower=lower, upper=0.9, num_rows=128)
    if passes:
        judge(comparison, algorithm)
    else:
        with pytest.raises(DemoFailed):
            judge(comparison, algorithm)


def test_score_line_has_exactly_the_promised_form() -> None:
    first, second = score_lines(Comparison(before=0.1234, after=0.5671, lower=0.4, upper=0.5, num_rows=128))
    assert first == "held-out reward: 0.123 -> 0.567"
    assert "95 % interval +0.400 to +0.500" in second
    assert "128 held-out rows" in second


def test_completion_cannot_write_to_the_terminal() -> None:
    assert "\x1b" not in printable("\x1b[2J hidden\n\u202e")
    assert len(printable("x" * 1000)) <= 102


def test_progress_shows_what_is_known_and_leaves_the_rest_open(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total_steps=10, is_terminal=False)
    assert progress.line() == "step 0/10  reward -  KL -  - tokens/s  time left -"
    point = {"phase": "train", "step": 4}
    values = {"reward_mean": 0.25, "kl_old": 0.001, "tokens_per_second": 812.4}
    progress.take([{**point, "name": name, "value": value} for name, value in values.items()])
    progress.take([{"phase": "valid", "step": 9, "name": "valid_reward_mean", "value": 0.9}])
    assert progress.first_step_at is not None
    progress.first_step_at -= 30
    assert progress.line() == "step 4/10  reward 0.250  KL 0.0010  812 tokens/s  time left 1:00"
    progress.show()
    progress.show()
    assert capsys.readouterr().out.count("step 4/10") == 1
