"""R19: what the KL estimators are estimates of, in the reward and in the loss, against the exact KL divergence of four tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.errors import InvalidRequest
from core.presets import resolve_options
from tests.trainer.batches import dense_logprobs
from tests.trainer.learners import gradients_of_one_step, make_learner, make_rollouts, move_weights, relative_difference
from trainer.kl import KL_ESTIMATORS

LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.0, 0.5, -0.4, 0.9], dtype=torch.float64).log_softmax(0)


def exact_kl(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(0)
    return (logp.exp() * (logp - REFERENCE)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_r19_k1_and_k3_are_unbiased_for_the_exact_kl(kind: str) -> None:
    logp = LOGITS.log_softmax(0)
    assert (logp.exp() * KL_ESTIMATORS[kind](logp, REFERENCE)).sum().item() == pytest.approx(exact_kl(LOGITS).item())


def test_r19_k3_is_never_negative_and_k2_is_half_the_square() -> None:
    logp = LOGITS.log_softmax(0)
    assert (KL_ESTIMATORS["k3"](logp, REFERENCE) >= 0).all()
    assert KL_ESTIMATORS["k2"](torch.tensor(1.0), torch.tensor(4.0)).item() == 4.5


def expected_gradient(kind: str) -> Tensor:
    """Expectation over sampled tokens of the gradient of the estimator, as a loss sees it (sampling is not differentiated)."""
    leaf = LOGITS.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    (logp.detach().exp() * KL_ESTIMATORS[kind](logp, REFERENCE)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_r19_in_the_loss_k1_has_no_expected_gradient_and_is_refused_and_k2_has_that_of_the_exact_kl() -> None:
    """NeMo-RL#2506: the mean of k1 was differentiated, which pulls nowhere."""
    leaf = LOGITS.clone().requires_grad_()
    exact_kl(leaf).backward()
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient("k2"), leaf.grad)
    with pytest.raises(InvalidRequest, match="kl_estimator 'k1' cannot be used with kl_placement 'loss'"):
        resolve_options("grpo", {"kl_estimator": "k1"})


def test_r19_in_the_loss_k3_has_the_expected_gradient_of_the_forward_kl() -> None:
    leaf = LOGITS.clone().requires_grad_()
    (REFERENCE.exp() * (REFERENCE - leaf.log_softmax(0))).sum().backward()
    torch.testing.assert_close(expected_gradient("k3"), leaf.grad)


def test_r19_in_the_reward_k1_gives_the_policy_gradient_of_the_exact_kl() -> None:
    exact, leaf = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    exact_kl(exact).backward()
    logp = leaf.log_softmax(0)
    (logp.detach().exp() * KL_ESTIMATORS["k1"](logp, REFERENCE).detach() * logp).sum().backward()
    torch.testing.assert_close(leaf.grad, exact.grad)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_r19_the_kl_in_the_loss_reaches_the_weights(tiny: Path, kind: str) -> None:
    """SkyRL#1340: it was computed without gradient. trl#4967, open-instruct#534: and with the wrong one."""
    given = {"kl_coefficient": 0.7, "kl_estimator": kind, "loss_aggregation": "token_mean", "max_grad_norm": 1e9}
    learner, batch = make_learner(tiny, wide=True, **given), make_rollouts([0.5] * 8, dtype=torch.float64)
    reference = dense_logprobs(learner.policy.model, batch).detach()
    move_weights(learner)
    difference = dense_logprobs(learner.policy.model, batch) - reference
    divergence = {"k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}[kind]
    loss = 0.7 * divergence[batch.completion_mask].mean()
    expected = list(torch.autograd.grad(loss, learner.policy.policy_parameters()))
    assert relative_difference(gradients_of_one_step(learner, batch), expected) <= 1e-6
