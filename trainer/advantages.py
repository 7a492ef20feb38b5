"""From rewards to advantages: the only place where PPO, GRPO and REINFORCE++ differ. Without gradient; nothing here samples or scores.

Every formula moves along the 1s of the masks: a token or row that does not count can hold anything.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core.options import Options
from trainer.batch import Batch, Estimate
from trainer.kl import KL_ESTIMATORS, kl_in_reward

Estimator = Callable[[Batch, float], Estimate]
"""(batch, current KL coefficient) -> estimate. The coefficient is read where KL sits in the reward."""

GROUP_EPSILON = 1e-4
WHITEN_EPSILON = 1e-8
MIN_WHITEN_STD = 1e-6


def make_estimator(options: Options) -> Estimator:
    """The estimator that `advantage_estimator` names."""
    makers = {"gae": _make_gae, "group": _make_group, "batch": _make_batch}
    return makers[options.advantage_estimator](options)


def reward_penalties(batch: Batch, kl_coefficient: float, options: Options) -> Tensor:
    """kl_coefficient * KL_t of each counted token where KL sits in the reward, else 0. -> [B, T] float64."""
    if not kl_in_reward(options):
        return torch.zeros_like(batch.sampling_logprobs, dtype=torch.float64)
    assert batch.old_logprobs is not None, "KL in the reward needs the old log-probs"
    assert batch.reference_logprobs is not None, "KL in the reward needs the reference log-probs"
    divergence = KL_ESTIMATORS[options.kl_estimator](batch.old_logprobs.double(), batch.reference_logprobs.double())
    return kl_coefficient * divergence.masked_fill(~batch.token_counts, 0.0)


def terminal_rewards(batch: Batch) -> Tensor:
    """Each grade on the last counted token of its row, 0 elsewhere. -> [B, T] float64.

    mask [1, 1, 0, 1, 0] and grade 0.5: [0, 0, 0, 0.5, 0].
    """
    mask = batch.token_counts
    later = mask.flip(1).cumsum(1).flip(1)
    return torch.where(mask & (later == 1), batch.rewards[:, None], 0.0)


def end_values(batch: Batch, goes_on: Tensor) -> Tensor:
    """V of the state after each row's last token: the recorded one where `goes_on` [B] bool, else 0. -> [B] float64."""
    if batch.bootstrap_values is None:
        assert not goes_on.any(), "the estimator needs recorded bootstrap values"
        return torch.zeros_like(batch.rewards)
    return batch.bootstrap_values.double().masked_fill(~goes_on, 0.0)


def generalized_advantages(rewards: Tensor, values: Tensor, after: Tensor, mask: Tensor, gamma: float, lambda_: float) -> Tensor:
    """A_t = delta_t + gamma * lambda * A_{t+1} with delta_t = r_t + gamma * V_{t+1} - V_t. -> [B, T], 0 where the mask is 0.

    t + 1 is the next token whose mask is 1; V after the last one is `after` [B]. The others are [B, T].
    Source: Schulman et al. 2016, arXiv:1506.02438 equation 16.
    """
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = after, torch.zeros_like(after)
    for t in reversed(range(rewards.shape[1])):
        counted = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(counted, delta + gamma * lambda_ * next_advantage, next_advantage)
        next_value = torch.where(counted, values[:, t], next_value)
        advantages[:, t] = torch.where(counted, next_advantage, 0.0)
    return advantages


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and (biased) variance 1 over the 1s of `mask`; only centred where the deviation is below 1e-6. [B, T] -> [B, T]."""
    counted = values[mask]
    if counted.numel() == 0:
        return torch.zeros_like(values)
    deviation = counted.std(correction=0)
    scale = deviation + WHITEN_EPSILON if deviation >= MIN_WHITEN_STD else torch.ones_like(deviation)
    return torch.where(mask, (values - counted.mean()) / scale, 0.0)


def _make_gae(options: Options) -> Estimator:
    """PPO: per token, from the value head. Source: Schulman et al. 2016 and 2017; Ouyang et al. 2022."""

    def estimate(batch: Batch, kl_coefficient: float) -> Estimate:
        assert batch.values is not None, "the estimator needs recorded values"
        mask, values = batch.token_counts, batch.values.double()
        # A graded completion is over, also one that was cut. With the option a cut one goes on, and its grade is not looked at.
        goes_on = batch.truncated & options.truncation_bootstrap
        after = end_values(batch, goes_on)
        rewards = terminal_rewards(batch).masked_fill(goes_on[:, None], 0.0) - reward_penalties(batch, kl_coefficient, options)
        targets = generalized_advantages(rewards, values, after, mask, options.gamma, options.value_gae_lambda)
        advantages = targets
        if options.gae_lambda != options.value_gae_lambda:
            advantages = generalized_advantages(rewards, values, after, mask, options.gamma, options.gae_lambda)
        if options.whiten_advantages:
            advantages = whiten(advantages, mask)
        returns = torch.where(mask, targets + values, 0.0)
        return _estimate(batch, advantages, returns, batch.counts)

    return estimate


def _make_batch(options: Options) -> Estimator:
    """REINFORCE++: grade minus the KL still to come, normalised over the batch. Source: Hu et al. 2025, arXiv:2501.03262."""

    def estimate(batch: Batch, kl_coefficient: float) -> Estimate:
        penalties = reward_penalties(batch, kl_coefficient, options)
        remaining = penalties.flip(1).cumsum(1).flip(1)
        advantages = whiten(batch.rewards[:, None] - remaining, batch.token_counts)
        return _estimate(batch, advantages, None, batch.counts)

    return estimate


def _make_group(options: Options) -> Estimator:
    """GRPO: one number per completion, relative to the others of its group. Source: Shao et al. 2024, arXiv:2402.03300.

    `advantage_scale` none: Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783. `leave_one_out`: Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
    """

    def estimate(batch: Batch, kl_coefficient: float) -> Estimate:
        rewards = batch.rewards - reward_penalties(batch, kl_coefficient, options).sum(1)
        groups = [group for group in _groups(batch) if len(group) >= 2]
        counts = torch.zeros_like(batch.counts)
        for group in groups:
            counts[group] = True
        scale = _batch_deviation(rewards, groups) if options.advantage_scale == "batch" else None
        per_row = torch.zeros_like(rewards)
        for group in groups:
            per_row[group] = _group_advantages(rewards[group], options, scale)
        advantages = per_row[:, None].expand(batch.completion_mask.shape)
        num_groups = len(batch.groups.unique())
        underfilled = 1 - len(groups) / num_groups if num_groups else 0.0
        return _estimate(batch, advantages, None, counts, underfilled)

    return estimate


def _groups(batch: Batch) -> list[Tensor]:
    """Row indices of the counted rows of each group that has any."""
    return [((batch.groups == number) & batch.counts).nonzero()[:, 0] for number in batch.groups[batch.counts].unique()]


def _group_advantages(rewards: Tensor, options: Options, batch_scale: Tensor | None) -> Tensor:
    """(R - baseline) / scale of one group's counted rewards [n], n >= 2; exactly 0 where all are equal."""
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if options.advantage_baseline == "leave_one_out":
        centred = rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
    if options.advantage_scale == "none":
        return centred
    scale = rewards.std() if batch_scale is None else batch_scale
    return centred / (scale + GROUP_EPSILON)


def _batch_deviation(rewards: Tensor, groups: list[Tensor]) -> Tensor:
    """Bessel-corrected deviation of the group-centred rewards of all counted rows."""
    if not groups:
        return torch.zeros_like(rewards.sum())
    return torch.cat([rewards[group] - rewards[group].mean() for group in groups]).std()


def _estimate(batch: Batch, advantages: Tensor, returns: Tensor | None, counts: Tensor, underfilled: float = 0.0) -> Estimate:
    """The estimate in the log-probs' precision, 0 where nothing counts, with the fractions that every estimator reports."""
    dtype = batch.sampling_logprobs.dtype
    mask = batch.completion_mask & counts[:, None]
    statistics = {"zero_variance_group_fraction": _zero_variance_fraction(batch), "underfilled_group_fraction": underfilled}
    return Estimate(
        advantages=advantages.masked_fill(~mask, 0.0).to(dtype),
        returns=None if returns is None else returns.to(dtype),
        batch_counts=counts,
        statistics=statistics,
    )


def _zero_variance_fraction(batch: Batch) -> float:
    """Groups whose grades are all equal, over the groups with at least two grades."""
    groups = [batch.rewards[group] for group in _groups(batch) if len(group) >= 2]
    return sum(bool(group.max() == group.min()) for group in groups) / len(groups) if groups else 0.0
