from pathlib import Path

import pytest

from tests.trainer.runs import make_run_directory, read_metrics, train_here
from trainer.kl import next_kl_coefficient


@pytest.mark.parametrize(
    ("kl", "completions", "expected"),
    [
        (6.0, 500, 0.1),  # at the target
        (6.6, 500, 0.1 * 1.005),  # a tenth above it, a twentieth of the horizon
        (5.4, 500, 0.1 * 0.995),
        (60.0, 500, 0.1 * 1.01),  # the error is clipped to 0.2
        (0.0, 500, 0.1 * 0.99),
        (-3.0, 500, 0.1 * 0.99),  # k1 of one step may be negative
        (0.0, 10_000, 0.1 * 0.8),
    ],
)
def test_the_coefficient_moves_by_the_clipped_error_times_the_share_of_the_horizon(kl: float, completions: int, expected: float) -> None:
    assert next_kl_coefficient(0.1, kl, completions, target=6.0, horizon=10_000) == pytest.approx(expected, rel=1e-12)


def test_a_horizon_shorter_than_a_step_cannot_turn_the_coefficient_negative() -> None:
    assert next_kl_coefficient(0.1, 0.0, 4096, target=6.0, horizon=16) == pytest.approx(0.08)


def test_in_a_run_the_coefficient_of_a_step_follows_from_the_step_before(tmp_path: Path) -> None:
    """Nothing has moved in step 1, so its KL is 0 and the coefficient falls by 20 % * 32 / 64."""
    folder = make_run_directory(tmp_path / "run", max_steps=3, kl_coefficient=0.1, kl_target=1e-9, kl_horizon=64, learning_rate=1e-2)
    train_here(folder)
    found = [line.values["kl_coefficient"] for line in read_metrics(folder)]
    assert found[:2] == pytest.approx([0.1, 0.09])
    assert found[2] == pytest.approx(0.099)
