"""Options of the objective, each through the loop and against its closed form or direction: test_option_<name>."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.options.observed import Observed, constant, observe
from tests.trainer.runs import FunctionGrader
from trainer.batch import Rollout
from trainer.random import Purpose
from trainer.rollout import RolloutEngine

PLAIN: dict[str, Any] = {"advantage_scale": "none", "loss_aggregation": "token_mean"}
TWICE: dict[str, Any] = {**PLAIN, "epochs_per_batch": 2, "learning_rate": 2e-2}
"""In the second pass the weights have moved, so that ratios differ from 1."""


def aggregate(per_token: Tensor, mask: Tensor, how: str, longest: int) -> float:
    """The three denominators in plain words."""
    rows = [row[counted] for row, counted in zip(per_token.double(), mask, strict=True)]
    if how == "sequence_mean":
        return float(sum(row.mean() for row in rows)) / len(rows)
    total = float(sum(row.sum() for row in rows))
    return total / (sum(len(row) for row in rows) if how == "token_mean" else len(rows) * longest)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "fixed_length"])
def test_option_loss_aggregation_is_the_denominator(tmp_path: Path, how: str) -> None:
    options = {"max_completion_tokens": 12, "model": {"hidden": 32, "head_scale": 6.0}}
    seen = observe(tmp_path, advantage_scale="none", loss_aggregation=how, **options)
    expected = -aggregate(seen.estimates[0].advantages, seen.batches[0].completion_mask, how, 12)
    assert seen.first("policy_loss") == pytest.approx(expected, abs=1e-6)
    if how != "sequence_mean":
        assert abs(expected) > 1e-4


def test_option_surrogate_cispo_weighs_log_probs(tmp_path: Path) -> None:
    clip, cispo = (observe(tmp_path / name, **PLAIN, surrogate=name) for name in ("clip", "cispo"))
    batch, advantages = cispo.batches[0], cispo.estimates[0].advantages
    expected = -aggregate(advantages * batch.sampling_logprobs, batch.completion_mask, "token_mean", 8)
    assert cispo.first("policy_loss") == pytest.approx(expected, abs=1e-5)
    assert clip.first("policy_loss") == pytest.approx(-aggregate(advantages, batch.completion_mask, "token_mean", 8), abs=1e-5)


def test_option_ratio_level_sequence_averages_the_log_ratio(tmp_path: Path) -> None:
    given = {**TWICE, "learning_rate": 2e-3, "loss_aggregation": "sequence_mean", "clip_low": 1.0, "clip_high": 100.0}
    token, sequence = (observe(tmp_path / level, **given, ratio_level=level) for level in ("token", "sequence"))
    assert 1.0 < sequence.first("ratio_max") < token.first("ratio_max")


@pytest.mark.parametrize(("name", "tight", "wide"), [("clip_low", 0.0, 1.0), ("clip_high", 0.0, 1e6)])
def test_option_clip_low_clip_high_bind_on_their_own_side(tmp_path: Path, name: str, tight: float, wide: float) -> None:
    other = {"clip_low": {"clip_high": 1e6}, "clip_high": {"clip_low": 1.0}}[name]
    bound, free = (observe(tmp_path / str(value), **TWICE, **other, **{name: value}) for value in (tight, wide))
    assert free.first("clip_fraction") == 0.0
    assert bound.first("clip_fraction") > 0.05


def test_option_clip_dual_bounds_the_loss_of_bad_completions(tmp_path: Path) -> None:
    free, bound = (observe(tmp_path / str(dual), **TWICE, clip_dual=dual) for dual in (None, 1.001))
    assert bound.first("policy_loss") < free.first("policy_loss") - 1e-4


def test_option_kl_coefficient_holds_the_policy_near_the_reference(tmp_path: Path) -> None:
    far, near = (observe(tmp_path / str(c), kl_coefficient=c, max_steps=6, learning_rate=1e-2) for c in (1e-9, 5.0))
    assert near.last("kl_reference") < 0.5 * far.last("kl_reference")
    assert far.first("kl_coefficient") == 1e-9


K: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: d.exp() - 1 - d,
}
"""Of d = reference - policy log-probs."""


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_option_kl_estimator_kl_placement_reward_lowers_each_reward_by_its_kl(tmp_path: Path, estimator: str) -> None:
    seen = observe(tmp_path, **PLAIN, kl_coefficient=0.5, kl_estimator=estimator, kl_placement="reward", max_steps=2, learning_rate=1e-2)
    batch = seen.batches[1]
    assert batch.old_logprobs is not None
    assert batch.reference_logprobs is not None
    penalties = (K[estimator]((batch.reference_logprobs - batch.old_logprobs).double()) * batch.completion_mask).sum(1) * 0.5
    assert float(penalties.abs().max()) > 1e-3
    rewards = (batch.rewards - penalties).view(4, 8)
    expected = (rewards - rewards.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(seen.estimates[1].advantages[:, 0].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_option_kl_placement_loss_adds_the_kl_of_each_token_to_the_loss(tmp_path: Path, estimator: str) -> None:
    seen = observe(tmp_path, **PLAIN, kl_coefficient=0.5, kl_estimator=estimator, kl_placement="loss", max_steps=2, learning_rate=1e-2)
    batch, advantages = seen.batches[1], seen.estimates[1].advantages
    assert batch.reference_logprobs is not None
    per_token = 0.5 * K[estimator](batch.reference_logprobs - batch.sampling_logprobs)
    kl = aggregate(per_token, batch.completion_mask, "token_mean", 8)
    assert kl > 1e-4
    assert seen.last("policy_loss") == pytest.approx(kl - aggregate(advantages, batch.completion_mask, "token_mean", 8), abs=2e-6)


def steered(seen: Observed, target: float, horizon: float) -> float:
    """What the first step's KL makes of its coefficient."""
    batch = seen.batches[0]
    old = batch.sampling_logprobs if batch.old_logprobs is None else batch.old_logprobs
    assert batch.reference_logprobs is not None
    kl = float(((old - batch.reference_logprobs) * batch.completion_mask).double().sum(1).mean())
    return seen.first("kl_coefficient") * (1 + max(-0.2, min(0.2, kl / target - 1)) * len(batch.counts) / horizon)


@pytest.mark.parametrize(("target", "horizon"), [(1e-6, 1000.0), (1e-6, 100.0), (10.0, 1000.0)])
def test_option_kl_target_kl_horizon_steer_the_coefficient(tmp_path: Path, target: float, horizon: float) -> None:
    seen = observe(tmp_path, kl_coefficient=0.1, kl_target=target, kl_horizon=horizon, max_steps=2)
    assert seen.first("kl_coefficient") == pytest.approx(0.1)
    assert seen.last("kl_coefficient") == pytest.approx(steered(seen, target, horizon), rel=1e-6)
    assert seen.last("kl_coefficient") != seen.first("kl_coefficient")


def test_option_entropy_coefficient_takes_the_entropy_off_the_loss(tmp_path: Path) -> None:
    off, on = (observe(tmp_path / str(c), **PLAIN, entropy_coefficient=c) for c in (0.0, 0.25))
    assert on.first("policy_loss") == pytest.approx(off.first("policy_loss") - 0.25 * off.first("entropy"), abs=1e-5)


def sampler_of_quarter_probability(patch: pytest.MonkeyPatch) -> None:
    """Once preflight is over, the sampler says that each token was four times less likely than the trainer finds."""
    generate = RolloutEngine.generate

    def shifted(self: RolloutEngine, *arguments: Any, **named: Any) -> list[Rollout]:
        rollouts = generate(self, *arguments, **named)
        if arguments[2].purpose == Purpose.PREFLIGHT:
            return rollouts
        lower = float(torch.tensor(4.0).log())
        return [Rollout(**{**vars(r), "logprobs": tuple(p - lower for p in r.logprobs)}) for r in rollouts]

    patch.setattr(RolloutEngine, "generate", shifted)


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"mismatch_correction": "none"}, 1.0),
        ({"mismatch_correction": "truncate"}, 2.0),
        ({"mismatch_correction": "truncate", "mismatch_cap": 3.0}, 3.0),
        ({"mismatch_correction": "truncate", "mismatch_cap": 5.0}, 4.0),
        ({"mismatch_correction": "reject"}, 0.0),
        ({"mismatch_correction": "reject", "mismatch_cap": 5.0}, 1.0),
    ],
)
def test_option_mismatch_correction_mismatch_cap_weigh_the_surrogate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], weight: float
) -> None:
    sampler_of_quarter_probability(monkeypatch)
    seen = observe(tmp_path, **{**PLAIN, "loss_aggregation": "fixed_length"}, **given)
    expected = -weight * aggregate(seen.estimates[0].advantages, seen.batches[0].completion_mask, "fixed_length", 8)
    assert seen.first("policy_loss") == pytest.approx(expected, rel=1e-4, abs=1e-7)


SHARED: dict[str, Any] = {"algorithm": "ppo", "value_model": "shared_backbone", "group_size": 4, "value_clip": None}


def values_only(folder: Path, **options: Any) -> Observed:
    """With constant rewards and values of 0 the whitened advantages are 0: only the value loss has a gradient.

    Into the backbone from the second pass on, when the head is no longer 0.
    """
    return observe(folder, FunctionGrader(constant), **{"algorithm": "ppo", "group_size": 4, "epochs_per_batch": 3, **options})


def test_option_value_model_separate_leaves_the_policy_alone(tmp_path: Path) -> None:
    separate, shared = (values_only(tmp_path / kind, value_model=kind) for kind in ("separate", "shared_backbone"))
    assert separate.moved() == 0.0
    assert shared.moved() > 0.0
    assert set(shared.weights("value.safetensors")) == {"head.weight", "head.bias"}
    assert len(separate.weights("value.safetensors")) > 2


def test_option_value_gradient_head_only_keeps_the_backbone(tmp_path: Path) -> None:
    for gradient, is_moved in (("full", True), ("head_only", False)):
        seen = values_only(tmp_path / gradient, value_model="shared_backbone", value_gradient=gradient)
        assert (seen.moved() > 0.0) == is_moved


def test_option_value_coefficient_weighs_the_value_loss(tmp_path: Path) -> None:
    for coefficient in (0.1, 2.0):
        seen = observe(tmp_path / str(coefficient), **SHARED, value_coefficient=coefficient)
        expected = seen.first("policy_loss") + coefficient * seen.first("value_loss")
        assert seen.first("loss") == pytest.approx(expected, rel=1e-5)


def test_option_value_clip_holds_new_values_near_the_recorded_ones(tmp_path: Path) -> None:
    free, tight = (values_only(tmp_path / str(clip), value_clip=clip, value_learning_rate=5e-2) for clip in (None, 1e-3))
    assert tight.first("value_loss") > free.first("value_loss")


def test_option_value_learning_rate_is_the_first_step_of_the_value_head(tmp_path: Path) -> None:
    """Adam's first step moves a weight by the learning rate, whatever its gradient."""
    for rate in (1e-3, 4e-3):
        seen = values_only(tmp_path / str(rate), value_learning_rate=rate, epochs_per_batch=1)
        assert float(seen.weights("value.safetensors")["head.bias"].abs()) == pytest.approx(rate, rel=1e-3)


def test_option_value_warmup_steps_freezes_the_policy(tmp_path: Path) -> None:
    for kind in ("separate", "shared_backbone"):
        frozen, learning = (
            observe(tmp_path / kind / str(steps), algorithm="ppo", value_model=kind, group_size=4, max_steps=3, value_warmup_steps=steps)
            for steps in (2, 0)
        )
        assert ["policy_loss" in values for values in frozen.metrics] == [False, False, True]
        assert all("policy_loss" in values for values in learning.metrics)
        assert 0.0 < frozen.moved() <= 1.01 * 3e-3 < learning.moved()
