"""The loss of a minibatch: clipped surrogate, KL, entropy and value loss. One objective for every algorithm; options choose its parts.

The ratio's denominator is the policy that sampled the tokens (`old_logprobs`); the reference model enters through the KL term only.
Every sum is divided by a number of the WHOLE minibatch, so that any split into microbatches gives the same gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.options import Options
from trainer.batch import Batch, Estimate, Scores
from trainer.kl import KL_ESTIMATORS, k3, kl_in_loss
from trainer.tally import Tally


@dataclass(frozen=True)
class Denominators:
    """What counts in a whole minibatch."""

    tokens: int
    sequences: int
    """Rows with at least one counted token."""

    @classmethod
    def of(cls, mask: Tensor) -> "Denominators":
        """mask: [b, T] bool, the counted tokens of the whole minibatch."""
        return cls(tokens=int(mask.sum()), sequences=int(mask.any(1).sum()))


Aggregate = Callable[[Tensor, Tensor, Denominators], Tensor]
Surrogate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """The parts of the loss, each chosen once. All per-token tensors are [b, T]."""

    log_ratio: Callable[[Tensor, Tensor], Tensor]
    """(difference of log-probs, mask) -> log ratio: per token, or the sequence's mean on each of its tokens."""

    surrogate: Surrogate
    """(ratio, advantages, logprobs) -> (loss per token, bool where the clip binds)."""

    mismatch_weight: Callable[[Tensor, Tensor], Tensor]
    """(old - sampling log-probs, mask) -> weight of the surrogate, without gradient."""

    aggregate: Aggregate
    kl: Callable[[Tensor, Tensor], Tensor] | None
    entropy_coefficient: float
    value_clip: float | None

    @property
    def is_silent_without_advantage(self) -> bool:
        """Whether the policy loss of a row whose advantages are 0 has no gradient."""
        return self.kl is None and self.entropy_coefficient == 0.0

    def policy_loss(
        self, scores: Scores, rows: Batch, estimate: Estimate, whole: Denominators, kl_coefficient: float, tally: Tally
    ) -> Tensor:
        """Surrogate, KL and entropy terms of some rows of a minibatch whose counted tokens are `whole`. -> scalar."""
        mask = rows.completion_mask & estimate.batch_counts[:, None]
        # Masked before any exp: an overflow in a row that does not count would come back as a NaN in the gradient.
        logprobs = scores.logprobs.masked_fill(~mask, 0.0)
        old = logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs
        ratio = self.log_ratio(logprobs - old, mask).exp()
        per_token, is_clipped = self.surrogate(ratio, estimate.advantages, logprobs)
        per_token = per_token * self.mismatch_weight(old - rows.sampling_logprobs, mask)
        if self.kl is not None:
            assert rows.reference_logprobs is not None, "KL in the loss needs the reference scored"
            per_token = per_token + kl_coefficient * self.kl(logprobs, rows.reference_logprobs.masked_fill(~mask, 0.0))
        if self.entropy_coefficient:
            per_token = per_token - self.entropy_coefficient * scores.entropy
        _tally_policy(tally, scores, rows, old, ratio, is_clipped, mask)
        return self.aggregate(per_token, mask, whole)

    def value_loss(self, scores: Scores, rows: Batch, estimate: Estimate, whole: Denominators) -> Tensor:
        """0.5 * max(error^2, error of the clipped value^2), mean over counted tokens. -> scalar.

        Source: Schulman et al. 2017 as implemented in OpenAI baselines `ppo2`; Huang et al. 2022, detail 9.
        """
        assert scores.values is not None
        assert rows.values is not None
        assert estimate.returns is not None
        mask = rows.completion_mask & estimate.batch_counts[:, None]
        squared = (scores.values - estimate.returns).square()
        if self.value_clip is not None:
            clipped = rows.values + (scores.values - rows.values).clamp(-self.value_clip, self.value_clip)
            squared = squared.maximum((clipped - estimate.returns).square())
        return token_mean(0.5 * squared, mask, whole)


def make_objective(options: Options) -> Objective:
    surrogates = {"clip": _make_clip, "cispo": _make_cispo}
    aggregations: dict[str, Aggregate] = {
        "token_mean": token_mean,
        "sequence_mean": sequence_mean,
        "fixed_length": _make_fixed_length(options.max_completion_tokens),
    }
    log_ratio = {"token": _per_token, "sequence": mean_per_sequence}[options.ratio_level]
    return Objective(
        log_ratio=log_ratio,
        surrogate=surrogates[options.surrogate](options),
        mismatch_weight=_make_mismatch_weight(options, log_ratio),
        aggregate=aggregations[options.loss_aggregation],
        kl=KL_ESTIMATORS[options.kl_estimator] if kl_in_loss(options) else None,
        entropy_coefficient=options.entropy_coefficient,
        value_clip=options.value_clip,
    )


def token_mean(per_token: Tensor, mask: Tensor, whole: Denominators) -> Tensor:
    """Sum over counted tokens / counted tokens of the minibatch. Source: DAPO, arXiv:2503.14476 equation 8."""
    return per_token.masked_fill(~mask, 0.0).sum() / whole.tokens


def sequence_mean(per_token: Tensor, mask: Tensor, whole: Denominators) -> Tensor:
    """Mean over the tokens of each sequence, then over sequences. Source: GRPO, arXiv:2402.03300 equation 3."""
    per_sequence = per_token.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return per_sequence.sum() / whole.sequences


def _make_fixed_length(max_completion_tokens: int) -> Aggregate:
    """Sum over counted tokens / (sequences * longest allowed length). Source: Dr. GRPO, arXiv:2503.20783."""

    def fixed_length(per_token: Tensor, mask: Tensor, whole: Denominators) -> Tensor:
        return per_token.masked_fill(~mask, 0.0).sum() / (whole.sequences * max_completion_tokens)

    return fixed_length


def _per_token(difference: Tensor, mask: Tensor) -> Tensor:
    return difference.masked_fill(~mask, 0.0)


def mean_per_sequence(difference: Tensor, mask: Tensor) -> Tensor:
    """Mean over the counted tokens of each row, on each of its tokens. Source: GSPO, arXiv:2507.18071 equation 7. [b, T] -> [b, T]."""
    mean = difference.masked_fill(~mask, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean * mask


def _make_clip(options: Options) -> Surrogate:
    """PPO's clipped surrogate. Source: Schulman et al. 2017, arXiv:1707.06347 equation 7; dual clip: Ye et al. 2020, arXiv:1912.09729."""
    low, high, dual = 1 - options.clip_low, 1 + options.clip_high, options.clip_dual

    def clip(ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        if dual is not None:
            loss = torch.where(advantages < 0, loss.minimum(-dual * advantages), loss)
        is_clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
        if dual is not None:
            is_clipped |= (advantages < 0) & (ratio > dual)
        return loss, is_clipped

    return clip


def _make_cispo(options: Options) -> Surrogate:
    """The clipped ratio as a constant weight on the log-prob. Source: MiniMax-M1 (CISPO), arXiv:2506.13585 equation 4."""
    low, high = 1 - options.clip_low, 1 + options.clip_high

    def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        loss = -ratio.detach().clamp(low, high) * advantages * logprobs
        return loss, (ratio < low) | (ratio > high)

    return cispo


def _make_mismatch_weight(options: Options, level: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Truncated importance weight for the sampler's log-probs. Source: Yao et al. 2025, "Your efficient RL framework secretly..." (TIS).

    `reject` weighs by 0 every sequence whose exp(mean difference) lies outside [1/cap, cap], and by 1 the others.
    """
    cap = options.mismatch_cap

    @torch.no_grad()
    def no_correction(difference: Tensor, mask: Tensor) -> Tensor:
        return torch.ones_like(difference)

    @torch.no_grad()
    def truncate(difference: Tensor, mask: Tensor) -> Tensor:
        return level(difference, mask).exp().clamp(max=cap)

    @torch.no_grad()
    def reject(difference: Tensor, mask: Tensor) -> Tensor:
        weight = mean_per_sequence(difference, mask).exp()
        return ((weight >= 1 / cap) & (weight <= cap)).to(difference.dtype)

    return {"none": no_correction, "truncate": truncate, "reject": reject}[options.mismatch_correction]


def _tally_policy(tally: Tally, scores: Scores, rows: Batch, old: Tensor, ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> None:
    tally.add_tokens("clip_fraction", is_clipped.double(), mask)
    tally.add_tokens("entropy", scores.entropy, mask)
    tally.add_tokens("sampler_mismatch_kl", k3(rows.sampling_logprobs, old), mask)
    tally.maximum("ratio_max", ratio.masked_fill(~mask, 0.0).max())
    if rows.reference_logprobs is not None:
        tally.add_tokens("kl_reference", k3(scores.logprobs.detach(), rows.reference_logprobs), mask)
