"""What a loss is divided by: R1 (microbatches), R2 (optimizer steps), R17 (the mask). Issue numbers name the systems that had the bug."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.options import Options
from tests.trainer.batches import choose_layout
from tests.trainer.handmade import make_batch
from tests.trainer.learners import (
    LENGTH,
    dense_gradient,
    gradients_of_one_step,
    make_learner,
    make_rollouts,
    move_weights,
    relative_difference,
    run_step,
)
from trainer.batch import Batch, Estimate, Scores
from trainer.objectives import Denominators, make_objective
from trainer.tally import Tally
from trainer.update import Learner

UNCLIPPED = {"max_grad_norm": 1e9}
STILL = {"learning_rate": 1e-30}
"""Too small to move a weight, so that later optimizer steps see the same policy."""
AGGREGATIONS = ["token_mean", "sequence_mean", "fixed_length"]

LOSSES: list[dict[str, Any]] = [
    {"loss_aggregation": "token_mean", "kl_coefficient": 0.1, "kl_estimator": "k2", "entropy_coefficient": 0.05},
    {"loss_aggregation": "sequence_mean", "kl_coefficient": 0.1, "clip_dual": 2.0},
    {"loss_aggregation": "fixed_length", "kl_coefficient": 0.0, "mismatch_correction": "reject"},
    {"algorithm": "gspo"},
    {"algorithm": "cispo"},
    {"algorithm": "reinforce_pp"},
    {"algorithm": "ppo", "kl_coefficient": 0.1},
    {"algorithm": "ppo", "kl_coefficient": 0.0, "value_model": "shared_backbone"},
]


def ragged_rollouts() -> Batch:
    """Eight groups: one without variance, one with a grade missing, the others ordinary."""
    rewards = [0.0, 1.0, 0.5, 1.0, 0.3, 0.3, 0.2, 0.9, 1.0, 0.0, 0.7, 0.1, 0.0, 0.4, 1.0, 0.6]
    batch = make_rollouts(rewards, num_groups=8, dtype=torch.float64)
    batch.counts[3] = False
    return batch


def moved_learner(tiny: Path, **given: Any) -> Learner:
    """Away from its reference and with a value head that is not 0."""
    learner = make_learner(tiny, wide=True, **UNCLIPPED, **given)
    move_weights(learner)
    return learner


@pytest.mark.parametrize("given", LOSSES, ids=lambda given: given.get("algorithm") or given["loss_aggregation"])
def test_r01_gradients_are_the_same_in_one_or_many_microbatches_packed_or_padded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """verl#906 #5625 #7200 #7321, SkyRL#925 #1296, trl#2617, ms-swift#10117: means of means, other denominators in packed rows."""
    batch, numbers, found = ragged_rollouts(), set(), []
    for packs in (False, True):
        choose_layout(monkeypatch, packs)
        for tokens in (4096, 64, 30, 16):
            learner = moved_learner(tiny, microbatch_tokens=tokens, **given)
            numbers.add(len(learner.plan(batch, 1)[0]))
            found.append(gradients_of_one_step(learner, batch))
    assert {1, 2, 4, 8} <= numbers
    assert all(relative_difference(gradients, found[0]) <= 1e-6 for gradients in found[1:])


def minibatches_by_themselves(tiny: Path, batch: Batch, learner: Learner, given: dict[str, Any]) -> list[Tensor]:
    """The gradients of one learner per minibatch of `learner`, each of which is given its rows as the whole batch."""
    plan = learner.plan(batch, 1)
    alone = {**given, "minibatches_per_batch": 1, "epochs_per_batch": 1}
    return [
        gradient
        for minibatch in plan
        for gradient in gradients_of_one_step(moved_learner(tiny, **alone), batch.select(torch.cat(minibatch).sort().values))
    ]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("spans", [{"minibatches_per_batch": 3}, {"epochs_per_batch": 2}], ids=str)
def test_r02_a_batch_over_several_optimizer_steps_leaves_the_scale_of_each_alone(
    tiny: Path, aggregation: str, spans: dict[str, int]
) -> None:
    """trl#5619 #6024 #5890: tokens of the whole generation batch, or the number of its steps, in the denominator of each step."""
    given = {"loss_aggregation": aggregation, "kl_coefficient": 0.1, **STILL, **spans}
    learner, batch = moved_learner(tiny, **given), ragged_rollouts()
    expected = minibatches_by_themselves(tiny, batch, learner, given)
    found = gradients_of_one_step(learner, batch)
    assert len(found) == len(expected) > len(learner.policy.policy_parameters())
    assert relative_difference(found, expected) <= 1e-6


def test_r02_the_reported_loss_is_the_mean_of_the_optimizer_steps(tiny: Path) -> None:
    given = {"kl_coefficient": 0.1, **STILL}
    learner, batch = moved_learner(tiny, minibatches_per_batch=4, **given), make_rollouts(num_groups=8, dtype=torch.float64)
    alone = [
        run_step(moved_learner(tiny, **given), batch.select(torch.cat(minibatch).sort().values))["loss"]
        for minibatch in learner.plan(batch, 1)
    ]
    assert run_step(learner, batch)["loss"] == pytest.approx(sum(alone) / 4, rel=1e-9)


@pytest.mark.parametrize(("aggregation", "expected"), [("token_mean", -2 / 3), ("sequence_mean", -3 / 4), ("fixed_length", -2 / 10)])
def test_r17_tokens_without_advantage_stay_in_the_denominator(aggregation: str, expected: float) -> None:
    """verl#2506: the advantages were passed as the mask."""
    batch = make_batch([0.0] * 2, [[1, 1], [1, 0]], [0, 0], old=torch.zeros(2, 2, dtype=torch.float64))
    options = Options(kl_coefficient=0.0, loss_aggregation=aggregation, max_completion_tokens=5)
    estimate = Estimate(torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), None, batch.counts)
    scores = Scores(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    loss = make_objective(options).policy_loss(scores, batch, estimate, Denominators.of(batch.token_counts), 0.0, Tally())
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_r17_groups_without_variance_stay_in_the_denominator_of_the_update(tiny: Path, aggregation: str) -> None:
    rewards = [0.5, 0.5, 1.0, 0.0, 0.3, 0.3, 0.0, 1.0]
    batch = make_rollouts(rewards, dtype=torch.float64)
    learner = make_learner(
        tiny, wide=True, kl_coefficient=0.0, loss_aggregation=aggregation, mismatch_correction="none", advantage_scale="none", **UNCLIPPED
    )
    lengths = batch.completion_mask.sum(1, keepdim=True)
    denominators = {"token_mean": lengths.sum(), "sequence_mean": 8 * lengths, "fixed_length": torch.tensor(8 * LENGTH)}
    advantages = torch.tensor([0.0, 0.0, 0.5, -0.5, 0.0, 0.0, -0.5, 0.5])[:, None]
    expected = dense_gradient(learner, batch, advantages * batch.completion_mask / denominators[aggregation])
    assert relative_difference(gradients_of_one_step(learner, batch), expected) <= 1e-6
