"""Measures, before the first step and on the job's own model, prompts and options, what training rests on. Leaves no trace.

Two of the shortest prompts, two completions of at most 16 tokens each, made-up advantages: seconds. No grader is asked, no
optimizer steps, no generator but ours is drawn from. What each property means: docs/preflight.md.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.errors import PreflightFailed
from trainer.batch import Batch, Estimate, Graded, Prompt, Rollout
from trainer.data import collate
from trainer.properties import Finding
from trainer.rollout import RolloutEngine, Sampling
from trainer.token_checks import check_template, check_tokens
from trainer.tolerances import TOLERANCES
from trainer.update import Learner, Plan

GROUP_SIZE = 2
MAX_TOKENS = 16
MIN_PROMPT_TOKENS = 64
"""Prompts are not cut below this, however small `microbatch_tokens` is."""

ADVANTAGES = (1.0, -0.5)
"""Of the completions of each group: of unequal size, so that two equal completions do not cancel out."""

REFERENCE_OFFSET = 0.5
"""How far the made-up reference lies below the sampler: at the reference itself the KL term has no gradient to compare."""

MIN_SCALE = 1e-9
"""Where every token was certain there is no gradient to compare."""


@dataclass(frozen=True)
class Preflight:
    """What was found where every property holds."""

    measured: dict[str, float]
    """By property."""

    warning: str | None
    """What is odd about the chat template without harm to training."""


def check_run(
    learner: Learner, engine: RolloutEngine, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, check: Callable[[], None]
) -> Preflight:
    """Measures every property on two of `prompts`, sampled as `sampling` says; `check` may raise to stop.

    Raises: PreflightFailed with the name and numbers of each property that does not hold.
    """
    options = learner.options
    chosen = choose_prompts(prompts)
    found, warning = check_template(tokenizer, chosen, sampling.end_token_ids, options.reasoning_effort)
    sampling = replace(sampling, max_completion_tokens=min(sampling.max_completion_tokens, MAX_TOKENS))
    room = max(MIN_PROMPT_TOKENS, options.microbatch_tokens // len(chosen) - GROUP_SIZE * MAX_TOKENS)
    shortened = [replace(prompt, token_ids=prompt.token_ids[-room:]) for prompt in chosen]
    rollouts = [_cut(rollout) for rollout in engine.generate(shortened, GROUP_SIZE, sampling, on_finished=lambda _: None, check=check)]
    # Their length is not the job's doing: as `length` they would not count under `mask_truncated`.
    graded = [Graded(replace(rollout, finish_reason="stop"), reward=0.0) for rollout in rollouts]
    batch = collate(graded, options, learner.policy.device)
    found.append(check_tokens(rollouts, batch, sampling))
    _refuse_violations(found)
    found += check_numbers(learner, graded, batch)
    _refuse_violations(found)
    worst = {finding.name: max(other.measured for other in found if other.name == finding.name) for finding in found}
    return Preflight(worst, warning)


def choose_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The shortest prompt and the next longer one, so that there is padding. A single row stands for both."""
    first, *others = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    others = others or [replace(first, index=first.index + 1)]
    longer = [prompt for prompt in others if len(prompt.token_ids) > len(first.token_ids)]
    return [first, (longer or others)[0]]


def _cut(rollout: Rollout) -> Rollout:
    """Half of the second completion of a group, unless it ended by itself: rows have different lengths, as in training."""
    if rollout.g == 0 or rollout.finish_reason == "stop":
        return rollout
    length = (len(rollout.token_ids) + 1) // 2
    support = None if rollout.support is None else rollout.support.select(torch.arange(length))
    return replace(rollout, token_ids=rollout.token_ids[:length], logprobs=rollout.logprobs[:length], support=support)


def _refuse_violations(found: list[Finding]) -> None:
    violated = [str(finding) for finding in found if not finding.holds]
    if violated:
        raise PreflightFailed(f"Nothing was trained: with this model and these options preflight fails. {' '.join(violated)}")


def check_numbers(learner: Learner, graded: list[Graded], batch: Batch) -> list[Finding]:
    """What takes forward and backward passes: log-probs, ratios and gradients. Leaves no gradient behind."""
    plan = learner.plan(batch, step=1)
    scored = learner.score(batch, plan)
    if scored.old_logprobs is None:
        scored = replace(scored, old_logprobs=learner.score_old(scored, plan))
    try:
        return [*_check_first_pass(learner, scored, plan), _check_padding(learner, graded, scored), *_check_gradients(learner, scored)]
    finally:
        _take_gradients(learner)


def _check_first_pass(learner: Learner, batch: Batch, plan: Plan) -> list[Finding]:
    """Log-probs and ratios in the microbatches of the job's own first pass."""
    assert batch.old_logprobs is not None
    estimate, mask = _made_up_estimate(batch), batch.completion_mask
    passes = [learner.accumulate(batch, estimate, part) for part in plan[: len(plan) // learner.options.epochs_per_batch]]
    _take_gradients(learner)
    logprobs = torch.stack([seen for seen, _ in passes]).sum(0)  # Each has 0 in the rows of the others.
    highest = torch.tensor([report["ratio_max"] for _, report in passes])
    ratios = torch.cat([(logprobs - batch.old_logprobs)[mask].exp().cpu(), highest])
    bounds, scale = TOLERANCES[learner.options.precision], _scale(learner)
    difference = bounds.logprobs.measure([batch.sampling_logprobs[mask]], [logprobs[mask]])
    deviation = bounds.first_ratio.measure([ratios], [torch.ones_like(ratios)])
    return [
        Finding("sampler_agrees", bounds.logprobs.in_words, difference, bounds.logprobs.allowed_at(scale)),
        Finding("first_ratio_is_one", bounds.first_ratio.in_words, deviation, bounds.first_ratio.allowed_at(scale)),
    ]


@torch.no_grad()
def _check_padding(learner: Learner, graded: list[Graded], batch: Batch) -> Finding:
    """Log-probs of each completion in a batch of its own, against all of them in one microbatch of rows of different lengths."""
    options, policy = learner.options, learner.policy
    alone = [policy.score(collate([entry], options, policy.device), options.temperature).logprobs[0] for entry in graded]
    together = policy.score(batch, options.temperature).logprobs
    padded = [row[counted] for row, counted in zip(together, batch.completion_mask, strict=True)]
    bound = TOLERANCES[options.precision].logprobs
    return Finding("padding_changes_nothing", bound.in_words, bound.measure(padded, alone), bound.allowed_at(_scale(learner)))


def _check_gradients(learner: Learner, batch: Batch) -> list[Finding]:
    """The gradient of all rows as one microbatch, against that of one microbatch for each group."""
    # Without old log-probs, because clipping would make a step out of a rounding error.
    batch = replace(batch, old_logprobs=None)
    if batch.reference_logprobs is not None:
        batch = replace(batch, reference_logprobs=batch.sampling_logprobs - REFERENCE_OFFSET)
    estimate = _made_up_estimate(batch)
    rows = torch.arange(len(batch.groups), device=batch.groups.device)
    learner.accumulate(batch, estimate, [rows])
    whole = _take_gradients(learner)
    learner.accumulate(batch, estimate, list(rows.split(GROUP_SIZE)))
    split = _take_gradients(learner)
    bound = TOLERANCES[learner.options.precision].gradient
    # The gradient of a token is 1 - p, rounded as 1 is: certain tokens leave few digits of it.
    uncertainty = float(1 - batch.sampling_logprobs[batch.completion_mask].exp().min())
    allowed = bound.allowed_at(max(MIN_SCALE, min(_scale(learner), uncertainty)))
    return [
        Finding("microbatches_change_nothing", f"{bound.in_words} ({part})", bound.measure(split[part], whole[part]), allowed)
        for part in whole
    ]


def _scale(learner: Learner) -> float:
    """Below temperature 1 logits are magnified, and so is what was rounded of them."""
    return min(1.0, learner.options.temperature)


def _made_up_estimate(batch: Batch) -> Estimate:
    """Each completion has the advantage of its place in the group, and values lie that far from their returns."""
    places = torch.tensor(ADVANTAGES, dtype=batch.sampling_logprobs.dtype, device=batch.groups.device)
    advantages = places.repeat(len(batch.groups) // GROUP_SIZE)[:, None] * batch.completion_mask
    return Estimate(advantages, None if batch.values is None else batch.values + advantages, batch.counts)


def _take_gradients(learner: Learner) -> dict[str, list[Tensor]]:
    """The gradients of `policy` and, where there is one, `value model`, whose parameters have none from here on."""
    groups = {"policy": learner.policy.policy_parameters(), "value model": learner.policy.value_parameters()}
    taken = {
        name: [parameter.new_zeros(()) if parameter.grad is None else parameter.grad for parameter in parameters]
        for name, parameters in groups.items()
        if parameters
    }
    for parameter in itertools.chain(*groups.values()):
        parameter.grad = None
    return taken
