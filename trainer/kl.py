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


def kl_in_reward(options: Options) -> bool:
    return options.needs_reference and options.kl_placement == "reward"


def kl_in_loss(options: Options) -> bool:
    return options.needs_reference and options.kl_placement == "loss"
