"""Whose log-probs, over which distribution: R3 (first ratio), R4 (behaviour policy), R5 and R6 (sampling settings), R7 (sequences).

The tiny model has 2 to 3 nats of entropy: at nearly uniform logits temperature and top_p would change next to nothing.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.options import Options
from core.run_directory import MODEL, End
from tests.trainer.batches import dense_logprobs, make_policy, make_prompts, sample
from tests.trainer.handmade import make_batch
from tests.trainer.learners import (
    dense_gradient,
    gradients_of_one_step,
    make_learner,
    make_rollouts,
    move_weights,
    relative_difference,
    run_step,
)
from tests.trainer.runs import make_run_directory, read_metrics, train_here
from trainer.batch import Batch, Estimate, Graded, Rollout, Scores
from trainer.data import collate
from trainer.objectives import Denominators, make_objective
from trainer.tally import Tally
from trainer.update import Learner

CPU = torch.device("cpu")
STEEP = {"hidden": 32, "head_scale": 12.0}
STILL = {"learning_rate": 1e-30}
"""Too small to move a weight."""


def collated(rollouts: list[Rollout], options: Options) -> Batch:
    """Rollouts with made-up grades, as the loop makes a batch of them."""
    return collate([Graded(rollout, (rollout.g % 3) / 2) for rollout in rollouts], options, CPU)


@pytest.mark.parametrize(
    "given",
    [
        {"algorithm": "grpo", "minibatches_per_batch": 2, "microbatch_tokens": 64},
        {"algorithm": "grpo", "finetuning": "lora", "lora_rank": 2},
        {"algorithm": "ppo", "group_size": 2},
        {"algorithm": "ppo", "group_size": 2, "value_model": "shared_backbone", "precision": "bf16"},
    ],
    ids=str,
)
def test_r03_on_the_first_pass_ratios_are_exactly_1_and_the_policy_is_its_own_reference(tmp_path: Path, given: dict[str, Any]) -> None:
    """unsloth#4502, trl#2608, open-r1#239: old log-probs from another code path, or with dropout on."""
    folder = make_run_directory(tmp_path / "run", model=STEEP, max_steps=1, kl_coefficient=0.05, epochs_per_batch=2, **STILL, **given)
    config = json.loads((folder / MODEL / "config.json").read_text())
    (folder / MODEL / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    assert train_here(folder).end is End.SUCCEEDED
    (values,) = (line.values for line in read_metrics(folder))
    assert (values["ratio_max"], values["clip_fraction"], values["kl_reference"]) == (1.0, 0.0, 0.0)
    assert values["kl_old"] <= 1e-10  # Scored in other microbatches.


def test_r04_after_an_optimizer_step_the_ratio_is_to_the_policy_that_sampled(tiny: Path) -> None:
    """torchforge#571: the denominator was the current policy, so that every ratio was 1."""
    learner = make_learner(tiny, wide=True, epochs_per_batch=2, learning_rate=1e-2, kl_coefficient=0.0)
    batch = make_rollouts(dtype=torch.float64)
    seen: list[Tensor] = []
    for optimizer in learner._optimizers.values():
        optimizer.register_step_pre_hook(lambda *_: seen.append(dense_logprobs(learner.policy.model, batch).detach()))
    report = run_step(learner, batch)
    first, second = seen
    expected = (second - first)[batch.completion_mask].exp().max().item()
    assert expected > 1.05
    assert report["ratio_max"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("correction", ["truncate", "reject"])
def test_r04_stale_rollouts_are_weighed_by_how_far_the_policy_has_moved(tiny: Path, correction: str) -> None:
    cap = 1.15
    options = {"kl_coefficient": 0.0, "advantage_scale": "none", "max_completion_tokens": 24, "loss_aggregation": "token_mean"}
    learner = make_learner(tiny, wide=True, group_size=3, max_grad_norm=1e9, mismatch_correction=correction, mismatch_cap=cap, **options)
    batch = collated(sample(make_policy(tiny), tiny, make_prompts(tiny), 3), learner.options)
    batch.sampling_logprobs = batch.sampling_logprobs.double()
    move_weights(learner, 0.005)
    mask = batch.completion_mask
    moved = (dense_logprobs(learner.policy.model, batch).detach() - batch.sampling_logprobs) * mask
    weights = moved.exp().clamp(max=cap)
    if correction == "reject":
        of_rows = (moved.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()
        weights = ((of_rows >= 1 / cap) & (of_rows <= cap)).double().expand(mask.shape)
        assert 0 < weights[:, 0].sum() < len(weights)
    assert (weights - 1)[mask].abs().mean() > 0.1
    advantages = batch.rewards[:, None] - 0.5
    expected = dense_gradient(learner, batch, weights * advantages * mask / mask.sum())
    assert relative_difference(gradients_of_one_step(learner, batch), expected) <= 1e-6


def test_r04_rollouts_of_a_step_ahead_have_a_ratio_to_the_weights_that_sampled_them(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", model=STEEP, max_steps=2, max_staleness=1, learning_rate=1e-2)
    assert train_here(folder).end is End.SUCCEEDED
    fresh, stale = (line.values for line in read_metrics(folder))
    assert (fresh["weight_lag"], fresh["ratio_max"]) == (0.0, 1.0)
    assert stale["weight_lag"] == 1.0
    assert stale["ratio_max"] > 1.05
    assert abs(stale["sampler_mismatch_kl"]) <= 1e-7


def dense_logprobs_over(model: Any, batch: Batch, temperature: float) -> Tensor:
    """[B, T] from whole logits, one token at a time, by a softmax over the tokens that could be sampled in its place."""
    length = batch.completion_mask.shape[1]
    found = torch.zeros(batch.completion_mask.shape)
    for row, t in batch.completion_mask.nonzero().tolist():
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        logits = model(input_ids=torch.cat([prompt, batch.completion_ids[row, :t]])[None]).logits[0, -1] / temperature
        ids = torch.arange(len(logits))
        if batch.support is not None:
            place = row * length + t
            ids = batch.support.token_ids[batch.support.offsets[place] : batch.support.offsets[place + 1]].long()
        found[row, t] = logits[batch.completion_ids[row, t]] - logits[ids].logsumexp(0)
    return found


def check_one_distribution(learner: Learner, tiny: Path, **sampling: Any) -> None:
    """Sampling, old, current and reference log-probs are those of one dense distribution."""
    options = learner.options
    rollouts = sample(learner.policy, tiny, make_prompts(tiny), 4, temperature=options.temperature, **sampling)
    batch = collated(rollouts, options)
    plan = learner.plan(batch, 1)
    scored = learner.score(batch, plan)
    with torch.no_grad():
        expected = dense_logprobs_over(learner.policy.model, batch, options.temperature)
    mask = batch.completion_mask
    for found in (batch.sampling_logprobs, scored.old_logprobs, scored.reference_logprobs):
        assert found is not None
        assert (found - expected)[mask].abs().max() <= 1e-4
        assert (found - expected)[:, 0].exp().mean().item() == pytest.approx(1.0, abs=1e-4)
    report = run_step(learner, batch)
    assert (report["ratio_max"], report["kl_reference"]) == (1.0, 0.0)
    assert abs(report["sampler_mismatch_kl"]) <= 1e-7


@pytest.mark.parametrize("finetuning", ["full", "lora"])
@pytest.mark.parametrize("temperature", [0.6, 1.6])
def test_r05_sampler_trainer_and_reference_divide_by_the_same_temperature(tiny: Path, finetuning: str, temperature: float) -> None:
    """trl#4159: the sampler's log-probs were those of temperature 1, ratios of 2.0 at temperature 0.6."""
    given = {"finetuning": finetuning, "temperature": temperature, "kl_coefficient": 0.1, "epochs_per_batch": 2}
    check_one_distribution(make_learner(tiny, group_size=4, max_completion_tokens=24, **STILL, **given), tiny)


@pytest.mark.parametrize("filters", [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_r06_sampler_trainer_and_reference_leave_out_the_same_tokens(tiny: Path, filters: dict[str, Any]) -> None:
    """trl#6789 #7269, vllm#42259: scored over the whole vocabulary, the mean ratio at top_p 0.8 was 0.896."""
    given = {"temperature": 0.8, "kl_coefficient": 0.1, "epochs_per_batch": 2, **filters}
    check_one_distribution(make_learner(tiny, group_size=4, max_completion_tokens=24, **STILL, **given), tiny, **filters)


@pytest.mark.parametrize("given", [{"temperature": 0.6}, {"temperature": 1.6}], ids=str)
def test_r05_a_run_trains_on_the_distribution_that_it_sampled_from(tmp_path: Path, given: dict[str, Any]) -> None:
    assert_no_mismatch(tmp_path / "run", given)


@pytest.mark.parametrize("given", [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_r06_a_run_trains_on_the_distribution_that_it_sampled_from(tmp_path: Path, given: dict[str, Any]) -> None:
    assert_no_mismatch(tmp_path / "run", given)


def assert_no_mismatch(folder: Path, given: dict[str, Any]) -> None:
    make_run_directory(folder, model=STEEP, max_steps=2, **given)
    assert train_here(folder).end is End.SUCCEEDED
    values = [line.values for line in read_metrics(folder)]
    assert max(abs(one["sampler_mismatch_kl"]) for one in values) <= 1e-7
    assert all(0.5 < one["entropy"] < 3.6 for one in values)


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_r07_the_ratio_of_a_sequence_is_a_mean_and_so_does_not_depend_on_length(length: int) -> None:
    old = torch.full((1, length), -1.0, dtype=torch.float64)
    batch = make_batch([0.0], [[1] * length], [0], old=old, sampling=old)
    options = Options(ratio_level="sequence", kl_coefficient=0.0, clip_low=0.5, clip_high=0.5)
    leaf = (old + 0.01).requires_grad_()
    estimate = Estimate(torch.ones_like(old), None, batch.counts)
    tally = Tally()
    loss = make_objective(options).policy_loss(Scores(leaf, old), batch, estimate, Denominators.of(batch.token_counts), 0.0, tally)
    assert loss.item() == pytest.approx(-math.exp(0.01))
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.sum().item() == pytest.approx(-math.exp(0.01))


@pytest.mark.parametrize(("correction", "expected"), [("truncate", 0.993), ("reject", 1.0)])
def test_r07_the_mismatch_of_a_sequence_is_a_mean_over_its_own_tokens(correction: str, expected: float) -> None:
    """trl#5814 #5815: a sum over 80 tokens of which each agrees to 0.7 % gave 0.569, and the longer the smaller."""
    options = Options(ratio_level="sequence", kl_coefficient=0.0, mismatch_correction=correction, mismatch_cap=1.2)
    mask = torch.zeros(3, 200, dtype=torch.bool)
    for row, length in enumerate((1, 80, 200)):
        mask[row, :length] = True
    weights = make_objective(options).mismatch_weight(torch.full(mask.shape, math.log(0.993), dtype=torch.float64), mask)
    assert weights[mask].tolist() == pytest.approx([expected] * int(mask.sum()))
