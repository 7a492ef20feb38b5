"""Batches for tests: from lists of token ids, from rollouts, and the log-probs that the model's own dense forward pass gives them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.options import Options
from trainer.batch import Batch, Prompt, Rollout, Support
from trainer.policy import Policy
from trainer.probes import takes_packed_rows
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, Sampling
from trainer.tokens import load_tokenizer, render_prompt

QUESTIONS = ("hi", "what is 2 + 2?", "a", "tell me about the sea, please")


def make_policy(folder: Path, **options: Any) -> Policy:
    effective = Options(**{"precision": "float32", "finetuning": "full", "kl_coefficient": 0.0, **options})
    return Policy.load(folder, effective, seed=3, device=torch.device("cpu"))


def make_prompts(folder: Path, questions: Sequence[str] = QUESTIONS) -> list[Prompt]:
    tokenizer = load_tokenizer(folder)
    rendered = [render_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    return [Prompt(index, ids, text, {}) for index, (text, ids) in enumerate(rendered)]


def make_sampling(**changes: Any) -> Sampling:
    plain = {"seed": 1, "purpose": Purpose.ROLLOUT, "step": 0, "round_": 0, "temperature": 1.0, "max_completion_tokens": 24, "stop": ()}
    return Sampling(**{**plain, "end_token_ids": frozenset({1}), **changes})


def sample(policy: Policy, folder: Path, prompts: list[Prompt], group_size: int, *, max_rows: int = 256, **sampling: Any) -> list[Rollout]:
    engine = RolloutEngine(policy, load_tokenizer(folder), policy.options.precision, max_rows=max_rows)
    return engine.generate(prompts, group_size, make_sampling(**sampling), on_finished=lambda _: None, check=lambda: None)


def make_batch(groups: list[tuple[Sequence[int], list[Sequence[int]]]]) -> Batch:
    """From (prompt ids, completions' ids) per group."""
    rows = [(group, prompt, completion) for group, (prompt, completions) in enumerate(groups) for completion in completions]
    count, width = len(rows), max(len(prompt) for _, prompt, _ in rows)
    length = max(1, max(len(completion) for _, _, completion in rows))
    prompt_ids, completion_ids = (torch.zeros(count, size, dtype=torch.int64) for size in (width, length))
    prompt_mask, completion_mask = torch.zeros(count, width, dtype=torch.bool), torch.zeros(count, length, dtype=torch.bool)
    for row, (_, prompt, completion) in enumerate(rows):
        prompt_ids[row, width - len(prompt) :], prompt_mask[row, width - len(prompt) :] = torch.tensor(prompt), True
        completion_ids[row, : len(completion)] = torch.tensor(completion, dtype=torch.int64)
        completion_mask[row, : len(completion)] = True
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        sampling_logprobs=torch.zeros(count, length),
        rewards=torch.zeros(count, dtype=torch.float64),
        counts=torch.ones(count, dtype=torch.bool),
        groups=torch.tensor([group for group, _, _ in rows]),
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def batch_of_rollouts(rollouts: list[Rollout]) -> Batch:
    """Rollouts of consecutive groups, with their sampling log-probs and supports."""
    groups: list[tuple[Sequence[int], list[Sequence[int]]]] = []
    last = None
    for rollout in rollouts:
        if rollout.prompt.index != last:
            groups.append((rollout.prompt.token_ids, []))
            last = rollout.prompt.index
        groups[-1][1].append(rollout.token_ids)
    batch = make_batch(groups)
    for row, rollout in enumerate(rollouts):
        batch.sampling_logprobs[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    supports = [rollout.support.pad(batch.completion_ids.shape[1]) for rollout in rollouts if rollout.support is not None]
    return replace(batch, support=Support.concatenate(supports) if supports else None)


def dense_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """[B, T] from the model's whole logits, one row at a time, without padding: the slow statement that everything is compared with."""
    rows = []
    for row in range(len(batch.groups)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        ids = torch.cat([prompt, batch.completion_ids[row]])
        log_p = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        rows.append(log_p[len(prompt) - 1 : -1].gather(1, batch.completion_ids[row][:, None])[:, 0])
    return torch.stack(rows) * batch.completion_mask


def choose_layout(monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    """Policies made from here on use packed rows, as this family's do, or one row per completion."""
    monkeypatch.setattr("trainer.policy.takes_packed_rows", takes_packed_rows if packs else lambda _: False)
