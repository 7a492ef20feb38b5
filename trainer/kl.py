"""How far two models are apart, estimated from the log-probs of sampled tokens. Knows nothing of losses or rewards."""

from collections.abc import Callable

import torch
from torch import Tensor

from core.options import Options


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log p - log q: unbiased for KL(p || q) on tokens sampled from p, of either sign. [B, T] -> [B, T].

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Half the squared log ratio: biased, but on tokens sampled from p its expected gradient is that of KL(p || q). [B, T] -> [B, T].

    Source: Schulman 2020.
    """
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased for KL(p || q) on tokens sampled from p and never negative. [B, T] -> [B, T].

    Source: Schulman 2020; the KL term of GRPO, arXiv:2402.03300 equation 4.
    """
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


MAX_KL_ERROR = 0.2


def next_kl_coefficient(coefficient: float, kl: float, num_completions: int, target: float, horizon: float) -> float:
    """The coefficient after a step whose `num_completions` are `kl` nats (k1, per completion) from the reference.

    It moves towards `target` by at most 20 % * num_completions / horizon; a horizon shorter than a step counts as one step.
    Source: Ziegler et al. 2019, arXiv:1909.08593 section 2.2.
    """
    error = min(max(kl / target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return coefficient * (1 + error * min(1.0, num_completions / horizon))


def kl_in_reward(options: Options) -> bool:
    return options.needs_reference and options.kl_placement == "reward"


def kl_in_loss(options: Options) -> bool:
    return options.needs_reference and options.kl_placement == "loss"
