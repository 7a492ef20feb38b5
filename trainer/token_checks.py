"""What preflight can check without a forward pass: that text, prompts, completions and batches hold the same tokens."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.errors import InvalidRequest
from trainer.batch import Batch, Prompt, Rollout
from trainer.layout import group_shapes, pack, pad
from trainer.properties import Finding
from trainer.rollout import Sampling
from trainer.tokens import PROBE, encode, render_answered


def check_template(
    tokenizer: Any, prompts: Sequence[Prompt], ends: frozenset[int], reasoning_effort: str
) -> tuple[list[Finding], str | None]:
    """Whether prompts are the tokens of their text, and completions end where the template ends a turn; -> also a warning.

    Only these two harm training, which never makes tokens out of a completion's text. What a template does to earlier turns once
    an answer follows (dropping the thinking, stripping white space), and tokens that merge across that border, only warn.
    """
    special = {known.content: token for token, known in tokenizer.added_tokens_decoder.items() if known.special}
    special.pop(tokenizer.unk_token, None)
    answered = [_answered(tokenizer, prompt, reasoning_effort) for prompt in prompts]
    wrong = sum(not _is_its_text(tokenizer, prompt, special) for prompt in prompts)
    endless = sum(not ends.issuperset(_special_tokens(text.partition(PROBE)[2], special)[:1]) for text in answered)
    name, pairs = "template_round_trips", list(zip(prompts, answered, strict=True))
    findings = [
        Finding(name, "the number of prompts whose tokens are not those of their text", wrong, 0),
        Finding(name, "the number of prompts whose answer ends with a token that ends no completion", endless, 0),
    ]
    texts = sum(not text.startswith(prompt.text) for prompt, text in pairs)
    tokens = sum(encode(tokenizer, text)[: len(prompt.token_ids)] != prompt.token_ids for prompt, text in pairs)
    decoded = sum(encode(tokenizer, _decoded(tokenizer, prompt)) != prompt.token_ids for prompt in prompts)
    if not (texts or tokens or decoded):
        return findings, None
    return findings, (
        f"The chat template does not round-trip: of {len(prompts)} prompts {texts} are written otherwise once an answer follows, "
        f"{tokens} have other tokens then, {decoded} change when decoded and encoded again. Training uses the tokens as sampled "
        "and is not affected; but a conversation that goes on shows the model its earlier turns otherwise than in training."
    )


def check_tokens(rollouts: Sequence[Rollout], batch: Batch, sampling: Sampling) -> Finding:
    """Whether `batch` and both layouts of it hold the sampled tokens, up to and including one end token, and count no other."""
    wrong = 0
    for row, rollout in enumerate(rollouts):
        wrong += _num_differing(batch.prompt_ids[row][batch.prompt_mask[row]], rollout.prompt.token_ids)
        wrong += _num_differing(batch.completion_ids[row][batch.token_counts[row]], rollout.token_ids)
        wrong += sum(token in sampling.end_token_ids for token in rollout.token_ids[:-1])
        wrong += rollout.finish_reason == "stop" and not sampling.stop and rollout.token_ids[-1] not in sampling.end_token_ids
    targets = [token for rollout in rollouts for token in rollout.token_ids]
    before = [token for rollout in rollouts for token in (rollout.prompt.token_ids[-1], *rollout.token_ids[:-1])]
    groups = group_shapes(batch)
    for layout in (pack(batch, groups, torch.float32), pad(batch, groups)):
        wrong += _num_differing(layout.targets, targets) + _num_differing(layout.input_ids.flatten()[layout.sources], before)
    return Finding("tokens_trained_are_tokens_sampled", "the number of wrong tokens", wrong, 0)


def _answered(tokenizer: Any, prompt: Prompt, reasoning_effort: str) -> str:
    """The prompt's messages and an answer to them; empty where the template takes no answer."""
    try:
        return render_answered(tokenizer, prompt.item["messages"], PROBE, reasoning_effort=reasoning_effort)
    except InvalidRequest:
        return ""


def _is_its_text(tokenizer: Any, prompt: Prompt, special: dict[str, int]) -> bool:
    """Whether the prompt is its text encoded, each special token of the text one token, and no special token besides."""
    held = [token for token in prompt.token_ids if token in special.values()]
    return prompt.token_ids == encode(tokenizer, prompt.text) and held == _special_tokens(prompt.text, special)


def _special_tokens(text: str, special: dict[str, int]) -> list[int]:
    """The special tokens written in `text`, in order, found without the tokenizer."""
    longest_first = sorted(special, key=len, reverse=True)
    return [special[found] for found in re.findall("|".join(map(re.escape, longest_first)), text)] if special else []


def _decoded(tokenizer: Any, prompt: Prompt) -> str:
    text: str = tokenizer.decode(prompt.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _num_differing(tokens: Tensor, expected: Sequence[int]) -> int:
    return sum(ours != theirs for ours, theirs in itertools.zip_longest(tokens.tolist(), expected))
