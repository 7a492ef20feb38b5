import math
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import Diverged
from core.options import Options
from tests.trainer.batches import dense_logprobs
from tests.trainer.learners import (
    GROUP_SIZE,
    GROUPS,
    LENGTH,
    SEPARATE,
    SHARED,
    changed,
    gradients_of_one_step,
    make_learner,
    make_rollouts,
    move_weights,
    run_step,
    state,
)
from trainer.advantages import make_estimator
from trainer.batch import Batch, Estimate, Scores
from trainer.checkpoints import state_digest
from trainer.update import Learner, _Microbatch, explained_variance, learning_rate_factor


def test_metrics_do_not_depend_on_the_split_into_microbatches(tiny: Path) -> None:
    whole, split = (run_step(make_learner(tiny, microbatch_tokens=tokens, kl_coefficient=0.1), make_rollouts()) for tokens in (4096, 16))
    assert whole == pytest.approx(split, rel=1e-4, abs=1e-6)


def test_a_minibatch_is_whole_groups_and_a_pass_holds_each_group_once(tiny: Path) -> None:
    learner = make_learner(tiny, minibatches_per_batch=2, epochs_per_batch=3, microbatch_tokens=16)
    batch = make_rollouts()
    plan = learner.plan(batch, 1)
    assert len(plan) == 6
    for epoch in range(3):
        passes = [torch.cat(minibatch).tolist() for minibatch in plan[2 * epoch : 2 * epoch + 2]]
        assert sorted(passes[0] + passes[1]) == list(range(GROUPS * GROUP_SIZE))
        for rows in passes:
            groups = batch.groups[rows].tolist()
            assert all(groups.count(group) == GROUP_SIZE for group in groups)
    orders = {str([sorted(torch.cat(rows).tolist()) for rows in learner.plan(batch, step)]) for step in range(8)}
    assert len(orders) > 1
    assert str(plan) == str(learner.plan(batch, 1))


@pytest.mark.parametrize(
    "given", [{"epochs_per_batch": 2, "microbatch_tokens": 16}, {"minibatches_per_batch": 2}, {**SHARED, "epochs_per_batch": 2}]
)
def test_the_first_ratio_is_exactly_1_where_old_log_probs_are_scored(tiny: Path, given: dict[str, Any]) -> None:
    learner = make_learner(tiny, **given)
    batch = make_rollouts()
    plan = learner.plan(batch, 1)
    scored = learner.score(batch, plan)
    assert scored.old_logprobs is not None
    for rows in plan[0]:
        now = learner.policy.score(scored.select(rows), 1.0, with_values=learner.options.needs_values).logprobs
        assert torch.equal(now.detach(), scored.old_logprobs[rows])


@pytest.mark.parametrize("given", [SEPARATE, SHARED])
def test_recorded_values_are_those_that_the_first_pass_of_the_update_sees(tiny: Path, given: dict[str, Any]) -> None:
    learner = make_learner(tiny, value_warmup_steps=3, **given)
    batch = make_rollouts()
    run_step(learner, batch)
    plan = learner.plan(batch, 2)
    scored = learner.score(batch, plan)
    assert scored.values is not None
    assert scored.values.any()
    for rows in plan[0]:
        now = learner.policy.score(scored.select(rows), 1.0, with_values=True).values
        assert now is not None
        assert torch.equal(now.detach(), scored.values[rows])


def test_a_single_pass_on_fresh_data_costs_no_scoring(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(tiny, kl_coefficient=0.0)
    batch = make_rollouts()
    plan = learner.plan(batch, 1)
    monkeypatch.setattr(learner.policy, "score", None)
    assert learner.score(batch, plan).old_logprobs is None


def test_the_ratio_leaves_1_after_the_first_optimizer_step(tiny: Path) -> None:
    learner = make_learner(tiny, epochs_per_batch=3, learning_rate=1e-2, kl_coefficient=0.0)
    report = run_step(learner, make_rollouts())
    assert report["ratio_max"] > 1.01
    assert report["kl_old"] > 1e-4
    assert report["clip_fraction"] > 0


def test_a_rise_of_the_advantage_raises_the_log_prob(tiny: Path) -> None:
    learner = make_learner(tiny, kl_coefficient=0.0, learning_rate=1e-3)
    batch = make_rollouts()
    before = learner.policy.score(batch, 1.0).logprobs.detach().sum(1)
    run_step(learner, batch)
    rise = learner.policy.score(batch, 1.0).logprobs.detach().sum(1) - before
    best, worst = batch.rewards.view(GROUPS, GROUP_SIZE).argmax(1), batch.rewards.view(GROUPS, GROUP_SIZE).argmin(1)
    grouped = rise.view(GROUPS, GROUP_SIZE)
    assert (grouped.gather(1, best[:, None]) > grouped.gather(1, worst[:, None])).all()


def test_groups_without_variance_have_no_policy_gradient_but_keep_their_kl(tiny: Path) -> None:
    learner = make_learner(tiny, kl_coefficient=0.0)
    report = run_step(learner, make_rollouts([0.5] * 8))
    assert (report["skipped_optimizer_steps"], report["policy_loss"]) == (1.0, 0.0)
    moved = make_learner(tiny, kl_coefficient=0.5)
    run_step(moved, make_rollouts())
    assert run_step(moved, make_rollouts([0.5] * 8), step=2)["grad_norm"] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_divergence_and_leaves_the_weights_alone(tiny: Path, bad: float) -> None:
    learner = make_learner(tiny, kl_coefficient=0.0)
    batch = make_rollouts()
    plan = learner.plan(batch, 1)
    estimate = make_estimator(learner.options)(batch, learner.kl_coefficient)
    broken = Estimate(estimate.advantages.index_fill(0, torch.tensor([3]), bad), None, estimate.batch_counts)
    before = state(learner)
    with pytest.raises(Diverged, match="step 1"):
        learner.update(batch, broken, plan, 1)
    assert not changed(before, learner, "policy")


def test_a_gradient_that_is_not_finite_is_divergence(tiny: Path) -> None:
    learner = make_learner(tiny, kl_coefficient=0.0)
    parameter = learner.policy.policy_parameters()[0]
    parameter.register_hook(lambda gradient: gradient * math.nan)
    before = state(learner)
    with pytest.raises(Diverged, match="gradient norm"):
        run_step(learner, make_rollouts())
    assert not changed(before, learner, "policy")


@pytest.mark.parametrize("given", [SEPARATE, SHARED])
def test_the_value_model_learns_alone_during_its_warm_up(tiny: Path, given: dict[str, Any]) -> None:
    learner = make_learner(tiny, value_warmup_steps=1, **given)
    before = state(learner)
    report = run_step(learner, make_rollouts(), step=1)
    assert changed(before, learner, "value")
    assert not changed(before, learner, "policy")
    assert "policy_loss" not in report
    run_step(learner, make_rollouts(), step=2)
    assert changed(before, learner, "policy")


@pytest.mark.parametrize("given", [SEPARATE, SHARED])
def test_the_value_head_learns_to_explain_the_returns(tiny: Path, given: dict[str, Any]) -> None:
    learner = make_learner(tiny, value_warmup_steps=40, value_learning_rate=3e-3, value_clip=None, total_steps=50, **given)
    batch = make_rollouts()
    reports = [run_step(learner, batch, step) for step in range(1, 41)]
    assert reports[-1]["value_loss"] < 0.5 * reports[0]["value_loss"]
    assert reports[-1]["value_grad_norm"] > 0


def test_a_separate_value_model_is_clipped_by_itself(tiny: Path) -> None:
    norms = []
    for clip in (1e9, 1e-3):
        learner = make_learner(tiny, max_grad_norm=clip, **SEPARATE)
        total = torch.stack([gradient.norm() for gradient in gradients_of_one_step(learner, make_rollouts())]).norm()
        norms.append(float(total))
    assert norms[1] == pytest.approx(math.sqrt(2) * 1e-3, rel=1e-2)
    assert norms[0] > 10 * norms[1]


def test_explained_variance_is_1_for_perfect_values_and_0_for_the_mean() -> None:
    batch = make_rollouts()
    returns = torch.randn(GROUPS * GROUP_SIZE, LENGTH)
    estimate = Estimate(returns, returns, batch.counts)
    batch.values = returns.clone()
    assert explained_variance(batch, estimate) == 1.0
    batch.values = torch.full_like(returns, float(returns[batch.completion_mask].mean()))
    assert explained_variance(batch, estimate) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    options = Options(warmup_steps=2, lr_schedule=schedule)
    assert [learning_rate_factor(options, step, 6) for step in range(1, 7)] == pytest.approx(expected)


def test_every_option_of_the_optimizer_reaches_it(tiny: Path) -> None:
    learner = make_learner(tiny, weight_decay=0.3, learning_rate=2e-3, value_learning_rate=5e-3, warmup_steps=4, **SEPARATE)
    report = run_step(learner, make_rollouts(), step=1)
    groups = {name: optimizer.param_groups[0] for name, optimizer in learner._optimizers.items()}
    assert {name: group["lr"] for name, group in groups.items()} == {"policy": 5e-4, "value": pytest.approx(1.25e-3)}
    assert report["learning_rate"] == 5e-4
    assert groups["policy"]["weight_decay"] == 0.3
    assert groups["policy"]["betas"] == (0.9, 0.95)


def test_groups_without_variance_cost_no_backward_pass_and_change_no_number(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = [0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.2, 0.9]
    batch = make_rollouts(rewards)
    expected = make_learner(tiny, kl_coefficient=0.0, max_grad_norm=1e9)
    monkeypatch.setattr(expected, "_split_silent", lambda now, plan: [_Microbatch(part, is_silent=False) for part in plan])
    learner = make_learner(tiny, kl_coefficient=0.0, max_grad_norm=1e9)
    scored: list[tuple[bool, int]] = []
    score = learner.policy.score

    def counting(rows: Batch, temperature: float, *, with_values: bool = False) -> Scores:
        scored.append((torch.is_grad_enabled(), len(rows.groups)))
        return score(rows, temperature, with_values=with_values)

    monkeypatch.setattr(learner.policy, "score", counting)
    reports = [run_step(expected, batch), run_step(learner, batch)]
    assert scored[:2] == [(True, 4), (False, 4)]
    assert reports[0] == pytest.approx(reports[1], rel=1e-4, abs=1e-6)
    for name, tensor in expected.policy.trainable_state().items():
        torch.testing.assert_close(learner.policy.trainable_state()[name], tensor, rtol=0, atol=1e-5)


def moved_learner(tiny: Path, **given: Any) -> Learner:
    """A learner whose weights have left those of the reference."""
    learner = make_learner(tiny, **given)
    move_weights(learner, 0.01)
    return learner


@pytest.mark.parametrize("given", [{}, {"epochs_per_batch": 2, "minibatches_per_batch": 2}])
def test_the_kl_coefficient_moves_once_a_step_by_k1_per_counted_completion(tiny: Path, given: dict[str, Any]) -> None:
    learner = moved_learner(tiny, kl_coefficient=0.1, kl_target=0.7, kl_horizon=80, microbatch_tokens=16, **given)
    batch = make_rollouts()
    batch.counts[3] = False  # leaves its group underfilled: two of eight rows count for nothing
    batch.completion_mask[4, 0] = False
    with torch.no_grad():
        difference = dense_logprobs(learner.policy.model, batch) - dense_logprobs(learner.policy._reference, batch)
    per_completion = [float(difference[row].sum()) for row in (0, 1, 4, 5, 6, 7)]
    error = max(-0.2, min(0.2, sum(per_completion) / 6 / 0.7 - 1))
    report = run_step(learner, batch)
    assert -0.2 < error < 0.2
    assert report["kl_coefficient"] == 0.1
    assert learner.kl_coefficient == pytest.approx(0.1 * (1 + error * 8 / 80), rel=1e-6)


def test_a_fixed_kl_coefficient_and_a_step_without_counted_completions_leave_it_alone(tiny: Path) -> None:
    batch = make_rollouts()
    fixed, adaptive = moved_learner(tiny, kl_coefficient=0.1), moved_learner(tiny, kl_coefficient=0.1, kl_target=2.0)
    run_step(fixed, batch)
    batch.counts[:] = False
    run_step(adaptive, batch)
    assert fixed.kl_coefficient == adaptive.kl_coefficient == 0.1


def test_the_current_kl_coefficient_weighs_the_kl_in_the_loss_and_survives_a_resume(tiny: Path) -> None:
    """Without variance in the grades KL is all there is: the loss is the coefficient times the mean of k3."""
    learner = moved_learner(tiny, kl_coefficient=0.1, kl_target=2.0, loss_aggregation="token_mean")
    learner.load_state(learner.state() | {"kl_coefficient": 0.7})
    report = run_step(learner, make_rollouts([0.5] * 8))
    assert report["kl_reference"] > 0.01
    assert report["loss"] == pytest.approx(0.7 * report["kl_reference"], rel=1e-6)
    assert report["kl_coefficient"] == 0.7
    restored = make_learner(tiny, kl_coefficient=0.1, kl_target=2.0)
    restored.load_state(learner.state())
    assert restored.kl_coefficient == learner.kl_coefficient != 0.7


@pytest.mark.parametrize("given", [SEPARATE, {**SHARED, "kl_coefficient": 0.1}])
def test_a_loaded_state_is_the_saved_one_bit_for_bit_in_the_middle_of_a_schedule(tiny: Path, given: dict[str, Any]) -> None:
    learner, restored = (make_learner(tiny, warmup_steps=4, lr_schedule="cosine", **given) for _ in range(2))
    run_step(learner, make_rollouts(), step=1)
    restored.load_state(learner.state())
    assert state_digest(restored.state()) == state_digest(learner.state()) != state_digest(make_learner(tiny, **given).state())


@pytest.mark.parametrize("given", [SEPARATE, {**SHARED, "kl_coefficient": 0.1}])
def test_bootstrap_values_are_recorded_in_the_rows_own_order_and_only_where_the_option_asks(tiny: Path, given: dict[str, Any]) -> None:
    """Both with the old log-probs (KL in the reward) and without them."""
    batch = make_rollouts()
    learner = moved_learner(tiny, truncation_bootstrap=True, microbatch_tokens=16, **given)
    found = learner.score(batch, learner.plan(batch, 1))
    values, bootstrap_values = learner.policy.values(batch)
    assert bootstrap_values is not None
    assert len(bootstrap_values.unique()) == GROUPS * GROUP_SIZE
    torch.testing.assert_close(found.bootstrap_values, bootstrap_values.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.values, values.detach(), rtol=0, atol=1e-5)
    assert make_learner(tiny, **given).score(batch, learner.plan(batch, 1)).bootstrap_values is None


@pytest.mark.parametrize("given", [SEPARATE, SHARED])
def test_ppo_metrics_do_not_depend_on_the_split_into_microbatches(tiny: Path, given: dict[str, Any]) -> None:
    batch = make_rollouts()
    batch.counts[2] = False
    shape = {**given, "kl_coefficient": 0.1, "epochs_per_batch": 2, "minibatches_per_batch": 2, "learning_rate": 1e-2}
    whole, split = (run_step(moved_learner(tiny, microbatch_tokens=tokens, **shape), batch) for tokens in (4096, 16))
    assert whole.keys() >= {"explained_variance", "value_grad_norm", "value_loss", "kl_reference", "clip_fraction", "kl_old"}
    assert whole["clip_fraction"] > 0
    assert whole == pytest.approx(split, rel=1e-3, abs=1e-5)
