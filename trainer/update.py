"""From a scored batch to new weights: epochs of minibatches of microbatches, one optimizer step per minibatch.

Every order is a function of (seed, step) and of shapes alone. Never looks at text, graders or files.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import Diverged
from core.options import Options
from trainer.batch import Batch, Estimate, Scores
from trainer.kl import k1, k3, kl_in_reward, next_kl_coefficient
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
        self.kl_coefficient = options.kl_coefficient
        """Of the next step: `update` moves it where the options have a `kl_target`."""

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
        first_pass = self._first_pass(plan)
        needs_old = batch.old_logprobs is None and (len(plan) > 1 or kl_in_reward(self.options))
        parts = [self._record(batch.select(rows), needs_old) for rows in first_pass]
        found: dict[str, Any] = {name: _gather(first_pass, [part[name] for part in parts]) for name in parts[0]}
        return replace(batch, **found)

    @torch.no_grad()
    def score_old(self, batch: Batch, plan: Plan) -> Tensor:
        """[B, T] old log-probs of rollouts that will be learned from after another update: scored by the weights that sampled them."""
        first_pass = self._first_pass(plan)
        parts = [self.policy.score(batch.select(rows), self.options.temperature).logprobs for rows in first_pass]
        return _gather(first_pass, parts)

    def _record(self, rows: Batch, needs_old: bool) -> dict[str, Tensor]:
        """What `score` adds to one microbatch, by its name in `Batch`."""
        found: dict[str, Tensor | None] = {}
        if needs_old:
            scores = self._score(rows)
            found = {"old_logprobs": scores.logprobs, "values": scores.values, "bootstrap_values": scores.bootstrap_values}
        elif self.options.needs_values:
            found["values"], found["bootstrap_values"] = self.policy.values(rows)
        if self.options.needs_reference:
            found["reference_logprobs"] = self.policy.reference_logprobs(rows, self.options.temperature)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _first_pass(self, plan: Plan) -> list[Tensor]:
        return [rows for minibatch in plan[: len(plan) // self.options.epochs_per_batch] for rows in minibatch]

    def state(self) -> dict[str, Any]:
        """All that changes from step to step beside the weights."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}
        return {"optimizers": optimizers, "kl_coefficient": self.kl_coefficient}

    def load_state(self, state: dict[str, Any]) -> None:
        """Moments and counts are those of `state`; base rates and weight decay stay those of the options."""
        for name, optimizer in self._optimizers.items():
            saved = state["optimizers"][name]
            pairs = zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
            groups = [{**own, "lr": old["lr"]} for own, old in pairs]
            optimizer.load_state_dict({**saved, "param_groups": groups})
        self.kl_coefficient = state["kl_coefficient"]

    def update(self, batch: Batch, estimate: Estimate, plan: Plan, step: int) -> dict[str, float]:
        """Optimizer steps over `plan`; -> the step's training metrics. Raises: Diverged on a loss or gradient that is not finite."""
        factor = learning_rate_factor(self.options, step, self._total_steps)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_rate"] * factor
        now = _Step(batch, estimate, step, train_policy=step > self.options.value_warmup_steps)
        done = [self._update_minibatch(now, minibatch) for minibatch in plan]
        self._tally_kl_old(now)
        report = now.tally.results() | {"skipped_optimizer_steps": float(done.count(False))}
        report |= {"learning_rate": self._optimizers["policy"].param_groups[0]["lr"], "kl_coefficient": self.kl_coefficient}
        if estimate.returns is not None:
            report["explained_variance"] = explained_variance(batch, estimate)
        self._adapt_kl_coefficient(now)
        return report

    def accumulate(self, batch: Batch, estimate: Estimate, minibatch: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Adds the gradient of one minibatch to the parameters', without a step. -> log-probs [B, T] of its rows, and its metrics."""
        now = _Step(batch, estimate, number=0, train_policy=True)
        self._accumulate(now, minibatch)
        return now.seen, now.tally.results()

    def _update_minibatch(self, now: "_Step", plan: list[Tensor]) -> bool:
        """One optimizer step over the microbatches `plan`; False where they teach nothing and the step is skipped."""
        teaches = self._accumulate(now, plan)
        if teaches:
            self._step_optimizers(now)
        return teaches

    def _accumulate(self, now: "_Step", plan: list[Tensor]) -> bool:
        """Adds the gradient of the microbatches `plan`; False where nothing counts or the gradient is 0 by itself."""
        whole = Denominators.of(now.mask[torch.cat(plan)])
        if whole.tokens == 0:
            return False
        parts = [part for part in self._split_silent(now, plan) if bool(now.mask[part.rows].any())]
        loss = sum(self._backward(now, part, whole) for part in parts)
        if not math.isfinite(loss):
            raise Diverged(f"The loss is {loss} in step {now.number}. A lower learning_rate or max_grad_norm may help.")
        for name in ("loss", *(["policy_loss"] if now.train_policy else []), *(["value_loss"] if self.options.needs_values else [])):
            now.tally.add(name, 0.0, 1)
        return not all(part.is_silent for part in parts)

    def _split_silent(self, now: "_Step", plan: list[Tensor]) -> list["_Microbatch"]:
        """The microbatches, with groups whose gradient is 0 by themselves: those are only scored, for the metrics.

        Only where advantages are all there is to learn from. Where log-probs were scored with `plan` before, it stays whole.
        """
        rows = torch.cat(plan).sort().values
        heard = now.batch.groups[(now.estimate.advantages != 0).any(1)].unique()
        is_heard = torch.isin(now.batch.groups[rows], heard)
        all_count = self.options.needs_values or not self._objective.is_silent_without_advantage
        is_silent = not all_count and not bool(is_heard.any())
        if all_count or is_silent or now.batch.old_logprobs is not None or bool(is_heard.all()):
            return [_Microbatch(part, is_silent) for part in plan]
        return [
            _Microbatch(part, is_silent)
            for is_silent, chosen in ((False, rows[is_heard]), (True, rows[~is_heard]))
            for part in self.policy.plan(now.batch, chosen, self.options.microbatch_tokens)
        ]

    def _backward(self, now: "_Step", part: "_Microbatch", whole: Denominators) -> float:
        """Adds the gradient of one microbatch; -> its part of the loss."""
        batch, estimate = now.batch.select(part.rows), now.estimate.select(part.rows)
        with torch.set_grad_enabled(not part.is_silent):
            scores = self._score(batch)
            losses = {}
            policy_loss = self._objective.policy_loss(scores, batch, estimate, whole, self.kl_coefficient, now.tally)
            if now.train_policy:
                losses["policy_loss"] = policy_loss
            if estimate.returns is not None:
                losses["value_loss"] = self._objective.value_loss(scores, batch, estimate, whole)
            weights = {"policy_loss": 1.0, "value_loss": 1.0 if self.policy.values_are_separate else self.options.value_coefficient}
            loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        if not part.is_silent:
            loss.backward()
        now.seen[part.rows] = scores.logprobs.detach()
        for name, value in {**losses, "loss": loss}.items():
            now.tally.add(name, value, 0)
        self._on_progress()
        return float(loss.detach())

    def _step_optimizers(self, now: "_Step") -> None:
        """Clips and steps; a shared backbone's head is clipped together with the policy, a separate value model by itself."""
        policy, value = self.policy.policy_parameters(), self.policy.value_parameters()
        if not now.train_policy:
            for parameter in policy:
                parameter.grad = None
        if value:
            now.tally.add("value_grad_norm", self._checked(_norm(value), now), 1)
        for name, optimizer in self._optimizers.items():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norm = self._checked(nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm), now)
            if name == "policy":
                now.tally.add("grad_norm", norm, 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _tally_kl_old(self, now: "_Step") -> None:
        """k3 of the sampling weights against the updated ones, on the first eighth of the rows: a whole pass would cost too much."""
        rows = torch.arange(-(-len(now.batch.groups) // 8), device=now.batch.groups.device)
        for part in self.policy.plan(now.batch, rows, self.options.microbatch_tokens):
            new = self.policy.score(now.batch.select(part), self.options.temperature).logprobs
            now.tally.add_tokens("kl_old", k3(now.old_logprobs[part], new), now.mask[part])

    def _adapt_kl_coefficient(self, now: "_Step") -> None:
        """Once after each step, from how far the weights that sampled it were from the reference."""
        sequences = Denominators.of(now.mask).sequences
        if self.options.kl_target is None or sequences == 0:
            return
        assert now.batch.reference_logprobs is not None, "an adaptive coefficient needs the reference scored"
        divergence = k1(now.old_logprobs.double(), now.batch.reference_logprobs.double()).masked_fill(~now.mask, 0.0)
        kl, completions = float(divergence.sum()) / sequences, len(now.batch.groups)
        self.kl_coefficient = next_kl_coefficient(self.kl_coefficient, kl, completions, self.options.kl_target, self.options.kl_horizon)

    def _checked(self, norm: Tensor, now: "_Step") -> float:
        value = float(norm)
        if not math.isfinite(value):
            raise Diverged(f"The gradient norm is {value} in step {now.number}. A lower learning_rate or max_grad_norm may help.")
        return value

    def _score(self, rows: Batch) -> Scores:
        return self.policy.score(rows, self.options.temperature, with_values=self.options.needs_values)


@dataclass
class _Step:
    """One step's update while it runs."""

    batch: Batch
    estimate: Estimate
    number: int
    train_policy: bool
    """False while the value model warms up."""

    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.mask = self.batch.completion_mask & self.estimate.batch_counts[:, None]
        self.seen = torch.zeros_like(self.batch.sampling_logprobs)
        """[B, T] log-probs of the last pass: with a single pass those of the weights that sampled."""

    @property
    def old_logprobs(self) -> Tensor:
        """[B, T] of the weights that sampled; right once every minibatch is done."""
        return self.seen if self.batch.old_logprobs is None else self.batch.old_logprobs


@dataclass(frozen=True)
class _Microbatch:
    rows: Tensor
    is_silent: bool
    """No row of it has a gradient."""


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


def _gather(plan: list[Tensor], parts: list[Tensor]) -> Tensor:
    """The parts [b, ...] of the microbatches of all rows in the rows' own order. -> [B, ...]."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rows, part in zip(plan, parts, strict=True):
        whole[rows] = part
    return whole


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())
