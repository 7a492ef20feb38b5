"""Options of the advantage estimators, each through the loop and against its closed form: test_option_<name>.

The value head is 0 before the first update, so that the first step's GAE is a sum of discounted rewards.
"""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.options.observed import Observed, observe

GAE: dict[str, Any] = {"algorithm": "ppo", "group_size": 4, "whiten_advantages": False}


def advantages(seen: Observed) -> list[float]:
    return [sample.advantage if sample.advantage is not None else float("nan") for sample in seen.samples]


def rewards(seen: Observed) -> list[float]:
    return [sample.reward if sample.reward is not None else float("nan") for sample in seen.samples]


def grouped(seen: Observed, size: int = 8) -> list[list[float]]:
    found = rewards(seen)
    return [found[start : start + size] for start in range(0, len(found), size)]


def test_option_advantage_estimator_group_is_grpos_formula(tmp_path: Path) -> None:
    seen = observe(tmp_path)
    expected = [(r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4) for group in grouped(seen) for r in group]
    assert advantages(seen) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_option_advantage_estimator_gae_without_values_is_the_reward_of_each_completion(tmp_path: Path) -> None:
    seen = observe(tmp_path, **GAE)
    assert advantages(seen) == pytest.approx(rewards(seen))


def test_option_advantage_estimator_batch_normalises_over_the_tokens_of_the_batch(tmp_path: Path) -> None:
    seen = observe(tmp_path, algorithm="reinforce_pp")
    per_token = [reward for sample, reward in zip(seen.samples, rewards(seen), strict=True) for _ in range(sample.num_tokens)]
    mean, deviation = statistics.fmean(per_token), statistics.pstdev(per_token)
    assert advantages(seen) == pytest.approx([(reward - mean) / deviation for reward in rewards(seen)], abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_option_advantage_scale_is_what_centred_rewards_are_divided_by(tmp_path: Path, scale: str) -> None:
    seen = observe(tmp_path, advantage_scale=scale)
    groups = grouped(seen)
    centred = [[r - statistics.fmean(group) for r in group] for group in groups]
    whole = statistics.stdev([c for group in centred for c in group]) + 1e-4
    divisors = {"group": [statistics.stdev(group) + 1e-4 for group in groups], "batch": [whole] * 4, "none": [1.0] * 4}[scale]
    expected = [c / divisor for group, divisor in zip(centred, divisors, strict=True) for c in group]
    assert advantages(seen) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_option_advantage_baseline_leave_one_out_is_the_mean_of_the_others(tmp_path: Path) -> None:
    seen = observe(tmp_path, advantage_baseline="leave_one_out", advantage_scale="none")
    expected = [r - statistics.fmean(group[:i] + group[i + 1 :]) for group in grouped(seen) for i, r in enumerate(group)]
    assert advantages(seen) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_option_whiten_advantages_gives_mean_0_and_variance_1_over_tokens(tmp_path: Path) -> None:
    seen = observe(tmp_path, **{**GAE, "whiten_advantages": True})
    counted = seen.estimates[0].advantages[seen.batches[0].token_counts].double()
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(counted.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert advantages(seen) != pytest.approx(rewards(seen))


def discounted(seen: Observed, discount: float) -> torch.Tensor:
    """reward * discount ^ (tokens still to come), row by row. [B, T]."""
    rows = torch.zeros_like(seen.estimates[0].advantages)
    for row, sample in enumerate(seen.samples):
        for t in range(sample.num_tokens):
            rows[row, t] = (sample.reward or 0.0) * discount ** (sample.num_tokens - 1 - t)
    return rows


@pytest.mark.parametrize(("name", "value"), [("gamma", 0.7), ("gae_lambda", 0.6)])
def test_option_gamma_gae_lambda_discount_the_terminal_reward_token_by_token(tmp_path: Path, name: str, value: float) -> None:
    seen = observe(tmp_path, **GAE, **{name: value})
    torch.testing.assert_close(seen.estimates[0].advantages, discounted(seen, value))


def test_option_value_gae_lambda_discounts_the_targets_of_the_value_model_alone(tmp_path: Path) -> None:
    seen = observe(tmp_path, **GAE, value_gae_lambda=0.5, value_clip=None)
    returns = seen.estimates[0].returns
    assert returns is not None
    torch.testing.assert_close(returns, discounted(seen, 0.5))
    torch.testing.assert_close(seen.estimates[0].advantages, discounted(seen, 1.0))
    assert seen.first("value_loss") == pytest.approx(float(0.5 * returns[seen.batches[0].token_counts].square().mean()), rel=1e-4)


def test_option_truncation_bootstrap_ends_a_cut_completion_with_the_value_of_its_last_state(tmp_path: Path) -> None:
    options = {**GAE, "max_completion_tokens": 12, "model": {"hidden": 32, "head_scale": 6.0}}
    off, on = (observe(tmp_path / str(is_on), **options, truncation_bootstrap=is_on) for is_on in (False, True))
    cut = [sample.finish_reason == "length" for sample in on.samples]
    assert 0 < sum(cut) < len(cut)
    assert advantages(off) == pytest.approx(rewards(off))
    assert advantages(on) == pytest.approx([0.0 if is_cut else reward for is_cut, reward in zip(cut, rewards(on), strict=True)])
