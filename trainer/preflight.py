"""Checks on the job's own model, prompts and options, before the first step, what training rests on. Takes seconds, leaves no trace.

Two of the job's shortest prompts, two completions of at most 16 tokens each, advantages made up. No grader is asked, no optimizer
steps, no generator but ours is used; what each property means and what to do about it: docs/preflight.md.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.errors import InvalidRequest, PreflightFailed
from trainer.batch import Batch, Estimate, Graded, Prompt, Rollout
from trainer.data import collate
from trainer.layout import group_shapes, pack, pad
from trainer.rollout import RolloutEngine, Sampling
from trainer.tokens import PROBE, encode, render_answered
from trainer.tolerances import TOLERANCES, Bound
from trainer.update import Learner, Plan

GROUP_SIZE = 2
MAX_TOKENS = 16
MIN_PROMPT_TOKENS = 64
"""Prompts are not cut below this, however small `microbatch_tokens` is."""

ADVANTAGES = (1.0, -0.5)
"""Of the two completions of a group. Of unequal size, so that two equal completions do not cancel out."""

REFERENCE_OFFSET = 0.5
"""How far the made-up reference lies below the policy: at the reference itself the KL term has no gradient to check."""

MIN_SCALE = 1e-9
"""Where every token was certain there is no gradient, and nothing to compare."""

ADVICE = {
    "template_round_trips": "The model's chat template and tokenizer do not belong together: use those that the model was released with.",
    "tokens_trained_are_tokens_sampled": "This is a fault of the trainer, not of the job: please report it with the model's name.",
    "sampler_agrees": "Sampler and trainer differ for this model with these options: try precision 'float32', then temperature 1.",
    "first_ratio_is_one": "Two forward passes over the same tokens differ: look for dropout or another source of chance in the model's "
    "configuration, and leave 'deterministic' on.",
    "padding_changes_nothing": "The model lets padding, or other rows of the batch, into its answer: use another attention "
    "implementation or model, or a batch_size of 1.",
    "microbatches_change_nothing": "The model's gradient depends on which rows lie together, or there is none: raise microbatch_tokens "
    "so that a step is one microbatch, and check lora_targets.",
}
"""By property, in the order in which they are checked: what to try."""


@dataclass(frozen=True)
class Finding:
    """One property, measured."""

    name: str
    what: str
    measured: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: {self.what} is {self.measured:.3g}, allowed is {self.allowed:.3g}. {ADVICE[self.name]}"


@dataclass(frozen=True)
class Preflight:
    """What was found where every property holds."""

    measured: dict[str, float]
    """By property."""

    warning: str | None
    """What is unusual about the chat template without harm to training."""


def check_run(
    learner: Learner, engine: RolloutEngine, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling, check: Callable[[], None]
) -> Preflight:
    """Measures every property on two of `prompts`, sampled as `sampling` says; `check` may raise to stop.

    Raises: PreflightFailed with the name and numbers of each property that does not hold.
    """
    chosen = choose_prompts(prompts)
    found, warning = check_template(tokenizer, chosen, sampling.end_token_ids, learner.options.reasoning_effort)
    sampling = replace(sampling, max_completion_tokens=min(sampling.max_completion_tokens, MAX_TOKENS))
    room = max(MIN_PROMPT_TOKENS, learner.options.microbatch_tokens // len(chosen) - GROUP_SIZE * MAX_TOKENS)
    shortened = [replace(prompt, token_ids=prompt.token_ids[-room:]) for prompt in chosen]
    rollouts = engine.generate(shortened, GROUP_SIZE, sampling, on_finished=lambda _: None, check=check)
    # Ends at 16 tokens are preflight's doing: as `length` they would not count in a job with mask_truncated.
    graded = [Graded(replace(rollout, finish_reason="stop"), reward=0.0) for rollout in rollouts]
    batch = collate(graded, learner.options, learner.policy.device)
    found.append(check_tokens(rollouts, batch, sampling))
    _refuse_violations(found)
    found += check_numbers(learner, graded, batch)
    _refuse_violations(found)
    return Preflight({finding.name: finding.measured for finding in found}, warning)


def choose_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The shortest prompt and the next longer one, so that there is padding. A single row stands for both."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.token_ids))
    first, others = ordered[0], ordered[1:] or [replace(ordered[0], index=ordered[0].index + 1)]
    longer = [prompt for prompt in others if len(prompt.token_ids) > len(first.token_ids)]
    return [first, (longer or others)[0]]


def _refuse_violations(findings: list[Finding]) -> None:
    violated = [str(finding) for finding in findings if not finding.holds]
    if violated:
        raise PreflightFailed(f"Nothing was trained: preflight found that this model with these options violates {' '.join(violated)}")


def check_template(
    tokenizer: Any, prompts: Sequence[Prompt], ends: frozenset[int], reasoning_effort: str
) -> tuple[list[Finding], str | None]:
    """Whether prompts are the tokens of their text, and completions end where the template ends a turn; -> also a warning.

    Only these two harm training, which never makes tokens out of a completion's text. What a template does to earlier turns once
    an answer follows (dropping the thinking, stripping white space), and tokens that merge across that border, only warn.
    """
    special = {token: known.content for token, known in tokenizer.added_tokens_decoder.items() if known.special}
    special.pop(tokenizer.unk_token_id, None)
    answered = [_answered(tokenizer, prompt, reasoning_effort) for prompt in prompts]
    wrong = sum(not _holds_its_text(tokenizer, prompt, special) for prompt in prompts)
    endless = sum(not ends.issuperset(_special_in(text.partition(PROBE)[2], special)[:1]) for text in answered)
    name, pairs = "template_round_trips", list(zip(prompts, answered, strict=True))
    findings = [
        Finding(name, "the number of prompts whose tokens are not those of their text", wrong, 0),
        Finding(name, "the number of prompts whose turn ends with a token that ends no completion", endless, 0),
    ]
    texts = sum(not text.startswith(prompt.text) for prompt, text in pairs)
    tokens = sum(encode(tokenizer, text)[: len(prompt.token_ids)] != prompt.token_ids for prompt, text in pairs)
    decoded = sum(encode(tokenizer, _decoded(tokenizer, prompt)) != prompt.token_ids for prompt in prompts)
    if not (texts or tokens or decoded):
        return findings, None
    return findings, (
        f"The chat template does not round-trip: of {len(prompts)} prompts {texts} are written otherwise once an answer follows, "
        f"{tokens} have other tokens then, {decoded} change when decoded and encoded again. Training is not affected, it uses the "
        "tokens as sampled; but a conversation that goes on shows the model its earlier turns otherwise than in training."
    )


def _answered(tokenizer: Any, prompt: Prompt, reasoning_effort: str) -> str:
    """The prompt's messages and an answer to them, rendered; empty where the template takes no answer."""
    try:
        return render_answered(tokenizer, prompt.item["messages"], PROBE, reasoning_effort=reasoning_effort)
    except InvalidRequest:
        return ""


def _holds_its_text(tokenizer: Any, prompt: Prompt, special: dict[int, str]) -> bool:
    """Whether the prompt is its text encoded, with each special token of the text as one token and no other beside them."""
    held = [token for token in prompt.token_ids if token in special]
    return encode(tokenizer, prompt.text) == prompt.token_ids and held == _special_in(prompt.text, special)


def _special_in(text: str, special: dict[int, str]) -> list[int]:
    """The special tokens that stand in `text`, in order, found without the tokenizer."""
    ids = {content: token for token, content in special.items()}
    return [ids[content] for content in re.findall("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)", text)]


def _decoded(tokenizer: Any, prompt: Prompt) -> str:
    text: str = tokenizer.decode(prompt.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def check_tokens(rollouts: list[Rollout], batch: Batch, sampling: Sampling) -> Finding:
    """Whether the batch, and both layouts of it, hold the sampled tokens, up to and including one end token, and count no other."""
    wrong = 0
    for row, rollout in enumerate(rollouts):
        wrong += _differing(batch.prompt_ids[row][batch.prompt_mask[row]], rollout.prompt.token_ids)
        wrong += _differing(batch.completion_ids[row][batch.token_counts[row]], rollout.token_ids)
        wrong += sum(token in sampling.end_token_ids for token in rollout.token_ids[:-1])
        wrong += rollout.finish_reason == "stop" and not sampling.stop and rollout.token_ids[-1] not in sampling.end_token_ids
    targets = [token for rollout in rollouts for token in rollout.token_ids]
    before = [token for rollout in rollouts for token in (rollout.prompt.token_ids[-1], *rollout.token_ids[:-1])]
    groups = group_shapes(batch)
    for layout in (pack(batch, groups, torch.float32), pad(batch, groups)):
        wrong += _differing(layout.targets, targets) + _differing(layout.input_ids.flatten()[layout.sources], before)
    return Finding("tokens_trained_are_tokens_sampled", "the number of wrong tokens", wrong, 0)


def _differing(tokens: Tensor, expected: Sequence[int]) -> int:
    return sum(ours != theirs for ours, theirs in itertools.zip_longest(tokens.tolist(), expected))


def check_numbers(learner: Learner, graded: list[Graded], batch: Batch) -> list[Finding]:
    """What takes forward and backward passes: log-probs, ratios and gradients. Leaves no gradient behind."""
    plan = learner.plan(batch, step=1)
    scored = learner.score(batch, plan)
    if scored.old_logprobs is None:
        scored = replace(scored, old_logprobs=learner.score_old(batch, plan))
    try:
        return [*_check_first_pass(learner, scored, plan), *_check_splits(learner, graded, scored)]
    finally:
        _take_gradients(learner)


def _check_first_pass(learner: Learner, batch: Batch, plan: Plan) -> list[Finding]:
    """The log-probs and ratios of the first pass over `plan`, with the microbatches and old log-probs that the job itself uses."""
    estimate, mask = _made_up_estimate(batch), batch.completion_mask
    passes = [learner.accumulate(batch, estimate, part) for part in plan[: len(plan) // learner.options.epochs_per_batch]]
    _take_gradients(learner)
    logprobs = torch.stack([seen for seen, _ in passes]).sum(0)  # Each has 0 in the rows of the others.
    ratios = torch.tensor([report["ratio_max"] for _, report in passes])
    if batch.old_logprobs is not None:
        ratios = torch.cat([ratios, (logprobs - batch.old_logprobs)[mask].exp().cpu()])
    bounds, scale = TOLERANCES[learner.options.precision], _scale(learner)
    return [
        _finding("sampler_agrees", bounds.logprobs, [batch.sampling_logprobs[mask]], [logprobs[mask]], scale),
        _finding("first_ratio_is_one", bounds.first_ratio, [ratios], [torch.ones_like(ratios)], scale),
    ]


def _check_splits(learner: Learner, graded: list[Graded], batch: Batch) -> list[Finding]:
    """All rows as one microbatch, against each completion alone (log-probs) and each group alone (gradient)."""
    mask, policy = batch.completion_mask, learner.policy
    # Old log-probs are left out, because clipping would make a step of a rounding error.
    batch = replace(batch, old_logprobs=None)
    if batch.reference_logprobs is not None:
        batch = replace(batch, reference_logprobs=batch.sampling_logprobs - REFERENCE_OFFSET)
    estimate = _made_up_estimate(batch)
    groups = [(batch.groups == group).nonzero()[:, 0] for group in batch.groups.unique()]
    together, _ = learner.accumulate(batch, estimate, [torch.cat(groups)])
    whole = _take_gradients(learner)
    learner.accumulate(batch, estimate, groups)
    split = _take_gradients(learner)
    alone = [collate([entry], learner.options, policy.device) for entry in graded]
    with torch.no_grad():
        unpadded = [policy.score(row, learner.options.temperature).logprobs[0] for row in alone]
    padded = [seen[counted] for seen, counted in zip(together, mask, strict=True)]
    bounds, scale = TOLERANCES[learner.options.precision], _scale(learner)
    # A token's gradient is 1 - p, which is rounded like 1.
    largest = float(1 - batch.sampling_logprobs[mask].exp().min())
    parts = zip(split, whole, strict=True)
    gradients = [_finding("microbatches_change_nothing", bounds.gradient, *part, max(min(scale, largest), MIN_SCALE)) for part in parts]
    return [
        _finding("padding_changes_nothing", bounds.logprobs, padded, unpadded, scale),
        max(gradients, key=lambda finding: finding.measured),
    ]


def _finding(name: str, bound: Bound, computed: Sequence[Tensor], expected: Sequence[Tensor], scale: float) -> Finding:
    return Finding(name, bound.in_words, bound.measure(computed, expected), bound.allowed_at(scale))


def _scale(learner: Learner) -> float:
    """Below temperature 1 logits, and so their rounding errors, are magnified."""
    return min(1.0, learner.options.temperature)


def _made_up_estimate(batch: Batch) -> Estimate:
    """Every token gets the advantage of its place in the group, and its value is that far from the return."""
    places = torch.tensor(ADVANTAGES, dtype=batch.sampling_logprobs.dtype, device=batch.groups.device)
    advantages = places.repeat(len(batch.groups) // GROUP_SIZE)[:, None] * batch.completion_mask
    return Estimate(advantages, None if batch.values is None else batch.values + advantages, batch.counts)


def _take_gradients(learner: Learner) -> list[list[Tensor]]:
    """The gradients of the policy's parameters and, where there is one, of the value model's, which have none from here on."""
    groups = [learner.policy.policy_parameters(), learner.policy.value_parameters()]
    taken = [[parameter.new_zeros(()) if parameter.grad is None else parameter.grad for parameter in group] for group in groups if group]
    for parameter in itertools.chain(*groups):
        parameter.grad = None
    return taken
