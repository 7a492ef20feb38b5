"""From a scored batch to new weights: epochs of minibatches of microbatches, one optimizer step per minibatch.

Every order is a function of (seed, step) and of shapes alone. Never looks at text, graders or files.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import Diverged
from core.options import Options
from trainer.batch import Batch, Estimate, Scores
from trainer.kl import k3, kl_in_reward
from trainer.objectives import Denominators, make_objective
from trainer.policy import Policy
from trainer.random import Purpose, permutation
from trainer.tally import Tally

BETAS = (0.9, 0.95)
Plan = list[list[Tensor]]
"""Minibatches in order of use, each a list of microbatches, each row indices of whole groups."""


def learning_rate_factor(options: Options, step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by in step `step` (from 1): a linear warm-up, then `lr_schedule`."""
    if step <= options.warmup_steps:
        return step / options.warmup_steps
    remaining = (total_steps - step + 1) / max(1, total_steps - options.warmup_steps)
    return {"constant": 1.0, "linear": remaining, "cosine": 0.5 * (1 - math.cos(math.pi * remaining))}[options.lr_schedule]


class Learner:
    """The optimizers and the objective of one job: scores batches before an update and makes the update."""

    def __init__(self, policy: Policy, options: Options, seed: int, total_steps: int, on_progress: Callable[[], None]) -> None:
        self.policy = policy
        self.options = options
        self._seed = seed
        self._total_steps = total_steps
        self._on_progress = on_progress
        self._objective = make_objective(options)
        self._optimizers = _make_optimizers(policy, options)

    def plan(self, batch: Batch, step: int) -> Plan:
        """The minibatches of step `step`: in each pass all groups, shuffled by the counter generator and dealt out evenly."""
        plan = []
        num_groups = int(batch.groups.max()) + 1
        for epoch in range(self.options.epochs_per_batch):
            order = permutation(self._seed, Purpose.MINIBATCH, step, epoch, num_groups)
            for part in torch.from_numpy(order).to(batch.groups.device).tensor_split(min(num_groups, self.options.minibatches_per_batch)):
                rows = torch.isin(batch.groups, part).nonzero()[:, 0]
                plan.append(self.policy.plan(batch, rows, self.options.microbatch_tokens))
        return plan

    @torch.no_grad()
    def score(self, batch: Batch, plan: Plan) -> Batch:
        """The batch with what must be known before the update: values, reference and old log-probs, each only where needed.

        One update on fresh data needs no old log-probs: there they are the current ones. Where they are scored, it is with the
        microbatches of the first pass of the update, so that the first ratio is exactly 1.
        """
        first_pass = [rows for minibatch in plan[: len(plan) // self.options.epochs_per_batch] for rows in minibatch]
        if len(plan) > 1 or kl_in_reward(self.options) or self.options.needs_values:
            parts = [self._score(batch.select(rows)) for rows in first_pass]
            values = _gather(batch, first_pass, [part.values for part in parts if part.values is not None])
            batch = replace(batch, old_logprobs=_gather(batch, first_pass, [part.logprobs for part in parts]), values=values)
        if self.options.needs_reference:
            reference = [self._reference(batch.select(rows)) for rows in first_pass]
            batch = replace(batch, reference_logprobs=_gather(batch, first_pass, reference))
        return batch

    def state(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])

    def update(self, batch: Batch, estimate: Estimate, plan: Plan, step: int) -> dict[str, float]:
        """Optimizer steps over `plan`; -> the step's training metrics. Raises: Diverged on a loss or gradient that is not finite."""
        factor = learning_rate_factor(self.options, step, self._total_steps)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_rate"] * factor
        tally, seen = Tally(), torch.zeros_like(batch.sampling_logprobs)
        train_policy = step > self.options.value_warmup_steps
        done = [self._update_minibatch(batch, estimate, rows, train_policy, seen, tally, step) for rows in plan]
        old = seen if batch.old_logprobs is None else batch.old_logprobs
        self._tally_kl_old(batch, old, estimate, tally)
        report = tally.results() | {"skipped_optimizer_steps": float(done.count(False))}
        report |= {"learning_rate": self._optimizers["policy"].param_groups[0]["lr"], "kl_coefficient": self.options.kl_coefficient}
        if estimate.returns is not None:
            report["explained_variance"] = explained_variance(batch, estimate)
        return report

    def _update_minibatch(
        self, batch: Batch, estimate: Estimate, plan: list[Tensor], train_policy: bool, seen: Tensor, tally: Tally, step: int
    ) -> bool:
        """One optimizer step over the microbatches `plan`; False where nothing counts and the step is skipped."""
        mask = batch.completion_mask & estimate.batch_counts[:, None]
        whole = Denominators.of(mask[torch.cat(plan)])
        if whole.tokens == 0:
            return False
        losses = [self._backward(batch, estimate, rows, whole, train_policy, seen, tally) for rows in plan if bool(mask[rows].any())]
        loss = float(torch.stack(losses).sum())
        if not math.isfinite(loss):
            raise Diverged(f"The loss is {loss} in step {step}. A lower learning_rate or max_grad_norm may help.")
        for name in ("loss", *(["policy_loss"] if train_policy else []), *(["value_loss"] if estimate.returns is not None else [])):
            tally.add(name, 0.0, 1)
        self._step_optimizers(train_policy, tally, step)
        return True

    def _backward(
        self, batch: Batch, estimate: Estimate, rows: Tensor, whole: Denominators, train_policy: bool, seen: Tensor, tally: Tally
    ) -> Tensor:
        """Adds the gradient of one microbatch; -> its part of the loss. Writes the log-probs that it saw into `seen`."""
        part, targets = batch.select(rows), estimate.select(rows)
        scores = self._score(part)
        seen[rows] = scores.logprobs.detach()
        loss = torch.zeros((), dtype=scores.logprobs.dtype, device=scores.logprobs.device)
        policy_loss = self._objective.policy_loss(scores, part, targets, whole, tally)
        if train_policy:
            tally.add("policy_loss", policy_loss, 0)
            loss = loss + policy_loss
        if targets.returns is not None:
            value_loss = self._objective.value_loss(scores, part, targets, whole)
            tally.add("value_loss", value_loss, 0)
            loss = loss + (value_loss if self.policy.values_are_separate else self.options.value_coefficient * value_loss)
        tally.add("loss", loss, 0)
        loss.backward()
        self._on_progress()
        return loss.detach()

    def _step_optimizers(self, train_policy: bool, tally: Tally, step: int) -> None:
        """Clips and steps; a shared backbone's head is clipped together with the policy, a separate value model by itself."""
        policy, value = self.policy.policy_parameters(), self.policy.value_parameters()
        if not train_policy:
            for parameter in policy:
                parameter.grad = None
        if value:
            tally.add("value_grad_norm", _finite_norm(value, step), 1)
        for optimizer in self._optimizers.values():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm)
            if optimizer is self._optimizers["policy"]:
                tally.add("grad_norm", _checked(norm, step), 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _tally_kl_old(self, batch: Batch, old: Tensor, estimate: Estimate, tally: Tally) -> None:
        """k3 of the sampling weights against the updated ones, on the first eighth of the groups: a whole pass would cost too much."""
        last_group = (int(batch.groups.max()) + 8) // 8
        rows = (batch.groups < last_group).nonzero()[:, 0]
        mask = batch.completion_mask & estimate.batch_counts[:, None]
        for part in self.policy.plan(batch, rows, self.options.microbatch_tokens):
            new = self.policy.score(batch.select(part), self.options.temperature).logprobs
            tally.add_tokens("kl_old", k3(old[part], new), mask[part])

    def _score(self, rows: Batch) -> Scores:
        return self.policy.score(rows, self.options.temperature, with_values=self.options.needs_values)

    def _reference(self, rows: Batch) -> Tensor:
        return self.policy.reference_logprobs(rows, self.options.temperature)


def explained_variance(batch: Batch, estimate: Estimate) -> float:
    """1 - Var(returns - recorded values) / Var(returns) over counted tokens; 0 where the returns do not vary."""
    assert batch.values is not None
    assert estimate.returns is not None
    mask = batch.completion_mask & estimate.batch_counts[:, None]
    returns, values = estimate.returns[mask].double(), batch.values[mask].double()
    if returns.numel() < 2 or float(returns.var()) == 0.0:
        return 0.0
    return 1.0 - float((returns - values).var() / returns.var())


def _make_optimizers(policy: Policy, options: Options) -> dict[str, torch.optim.AdamW]:
    """`policy`, and `value` for a separate value model; a head on a shared backbone is a second group of `policy`."""
    assert options.learning_rate is not None, "the options of a job are effective ones"
    groups: list[dict[str, Any]] = [{"params": policy.policy_parameters(), "base_rate": options.learning_rate}]
    if options.needs_values:
        groups.append({"params": policy.value_parameters(), "base_rate": options.value_learning_rate or options.learning_rate})
    if policy.values_are_separate:
        return {"policy": _adamw(groups[:1], options), "value": _adamw(groups[1:], options)}
    return {"policy": _adamw(groups, options)}


def _adamw(groups: list[dict[str, Any]], options: Options) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=groups[0]["base_rate"], betas=BETAS, weight_decay=options.weight_decay, fused=True)


def _gather(batch: Batch, plan: list[Tensor], parts: list[Tensor]) -> Tensor | None:
    """The parts [b, T] of the microbatches in the rows' own order. -> [B, T], None without parts."""
    if not parts:
        return None
    whole = torch.zeros_like(batch.sampling_logprobs, dtype=parts[0].dtype)
    for rows, part in zip(plan, parts, strict=True):
        whole[rows] = part
    return whole


def _finite_norm(parameters: Iterable[nn.Parameter], step: int) -> float:
    norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
    return _checked(torch.stack(norms).norm(), step) if norms else 0.0


def _checked(norm: Tensor, step: int) -> float:
    value = float(norm)
    if not math.isfinite(value):
        raise Diverged(f"The gradient norm is {value} in step {step}. A lower learning_rate or max_grad_norm may help.")
    return value
