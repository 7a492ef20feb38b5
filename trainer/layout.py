"""How the rows of a microbatch lie in one forward pass, and which rows go together. Shapes in, index tensors out; knows no model.

`packed`: one row per group, the prompt once and every completion behind it; each completion sees the prompt and itself.
`padded`: one row per completion, prompt and completion, padded on the right, where a causal model never looks.
A completion ends at the last 1 of its mask; tokens in holes before that are context without being scored.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batch import Batch

_PAD_SEGMENT = -1


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one forward pass: `per_token` in the linear layers, `per_pair` of query and key in attention."""

    per_token: float
    per_pair: float


@dataclass(frozen=True)
class Group:
    """The shape of one group: where its rows lie in the batch and how long they are."""

    rows: tuple[int, ...]
    prompt_length: int
    completion_lengths: tuple[int, ...]

    @property
    def packed_length(self) -> int:
        return self.prompt_length + sum(self.completion_lengths)

    @property
    def padded_length(self) -> int:
        return self.prompt_length + max(self.completion_lengths)


@dataclass(frozen=True)
class Layout:
    """One forward pass over R rows of S tokens, in which N completion tokens are scored."""

    input_ids: Tensor
    """[R, S] int64."""

    position_ids: Tensor | None
    """[R, S] int64; every completion goes on from its prompt. None: plain 0..S-1."""

    attention_mask: Tensor | None
    """[R, 1, S, S], 0 where the query may see the key and the smallest number elsewhere. None: plain causal attention."""

    sources: Tensor
    """[N] int64 into R * S: the hidden state that predicts the token."""

    targets: Tensor
    """[N] int64: the token."""

    places: Tensor
    """[N] int64 into b * T: where the token lies in the batch."""

    ends: Tensor
    """[b] int64 into R * S: the hidden state after each row's last token."""


def group_shapes(batch: Batch) -> list[Group]:
    """The groups of `batch` in its order."""
    prompts = batch.prompt_mask.sum(1).tolist()
    mask = batch.completion_mask
    ends = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    completions = (mask * ends).amax(1).tolist()
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(batch.groups.tolist()):
        rows.setdefault(group, []).append(row)
    return [Group(tuple(members), prompts[members[0]], tuple(completions[row] for row in members)) for members in rows.values()]


def is_packing_cheaper(groups: list[Group], cost: Cost) -> bool:
    """Whether packed rows take no more operations than padded ones: sharing saves prompts, but attention over a row is quadratic."""
    width = max(group.packed_length for group in groups)
    packed = len(groups) * (width * cost.per_token + width * width * cost.per_pair)
    width = max(group.padded_length for group in groups)
    padded = sum(len(group.rows) for group in groups) * (width * cost.per_token + width * width * cost.per_pair)
    return packed <= padded


def num_tokens(groups: list[Group], packs: bool) -> int:
    """Tokens of one forward pass over `groups`, padding included."""
    if packs:
        return len(groups) * max(group.packed_length for group in groups)
    return sum(len(group.rows) for group in groups) * max(group.padded_length for group in groups)


def plan_microbatches(groups: list[Group], microbatch_tokens: int, cost: Cost | None) -> list[list[Group]]:
    """Whole groups of like length together, longest first, at most `microbatch_tokens` each (one group at least).

    `cost` None: the model takes no packed rows.
    """
    plan: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: -group.packed_length):
        joined = [*plan[-1], group] if plan else [group]
        fits = num_tokens(joined, cost is not None and is_packing_cheaper(joined, cost)) <= microbatch_tokens
        if plan and fits:
            plan[-1] = joined
        else:
            plan.append([group])
    return plan


def pack(batch: Batch, groups: list[Group], dtype: torch.dtype) -> Layout:
    """One row per group; the mask has `dtype`."""
    width = max(group.packed_length for group in groups)
    arrays = _Arrays(batch, len(groups), width)
    for row, group in enumerate(groups):
        arrays.put_prompt(row, group.rows[0], group.prompt_length)
        start = group.prompt_length
        for segment, (member, length) in enumerate(zip(group.rows, group.completion_lengths, strict=True), 1):
            arrays.put_completion(row, start, member, length, group.prompt_length, segment)
            start += length
    device = batch.completion_ids.device
    mask = _shared_prefix_mask(torch.from_numpy(arrays.segments).to(device), dtype)
    return arrays.finish(torch.from_numpy(arrays.positions).to(device), mask)


def pad(batch: Batch, groups: list[Group]) -> Layout:
    """One row per completion."""
    width = max(group.padded_length for group in groups)
    arrays = _Arrays(batch, sum(len(group.rows) for group in groups), width)
    row = 0
    for group in groups:
        for member, length in zip(group.rows, group.completion_lengths, strict=True):
            arrays.put_prompt(row, member, group.prompt_length)
            arrays.put_completion(row, group.prompt_length, member, length, group.prompt_length, segment=1)
            row += 1
    return arrays.finish(None, None)


def _shared_prefix_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, S] segment numbers (0 = prompt) -> [R, 1, S, S] additive: causal, and only over the prompt and the own segment."""
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    queries, keys = segments[:, :, None], segments[:, None, :]
    is_seen = causal & ((keys == 0) | (keys == queries))
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=segments.device).masked_fill_(~is_seen, torch.finfo(dtype).min)
    return mask[:, None]


class _Arrays:
    """The growing arrays of a layout of `rows` x `width` tokens."""

    def __init__(self, batch: Batch, rows: int, width: int) -> None:
        self._device = batch.completion_ids.device
        self._prompt_ids = batch.prompt_ids.cpu().numpy()
        self._completion_ids = batch.completion_ids.cpu().numpy()
        self._mask = batch.completion_mask.cpu().numpy()
        self._ids = np.zeros((rows, width), np.int64)
        self.positions = np.zeros((rows, width), np.int64)
        self.segments = np.full((rows, width), _PAD_SEGMENT, np.int64)
        self._sources: list[NDArray[np.int64]] = []
        self._places: list[NDArray[np.int64]] = []
        self._ends = np.zeros(len(self._mask), np.int64)

    def put_prompt(self, row: int, member: int, length: int) -> None:
        self._ids[row, :length] = self._prompt_ids[member, self._prompt_ids.shape[1] - length :]
        self.positions[row, :length] = np.arange(length)
        self.segments[row, :length] = 0

    def put_completion(self, row: int, start: int, member: int, length: int, prompt_length: int, segment: int) -> None:
        end = start + length
        self._ids[row, start:end] = self._completion_ids[member, :length]
        self.positions[row, start:end] = prompt_length + np.arange(length)
        self.segments[row, start:end] = segment
        scored = np.flatnonzero(self._mask[member, :length])
        before = np.where(scored > 0, start + scored - 1, prompt_length - 1)
        width = self._ids.shape[1]
        self._sources.append(row * width + before)
        self._ends[member] = row * width + (end if length else prompt_length) - 1
        self._places.append(member * self._mask.shape[1] + scored)

    def finish(self, position_ids: Tensor | None, attention_mask: Tensor | None) -> Layout:
        places = np.concatenate(self._places)
        arrays = (self._ids, np.concatenate(self._sources), self._completion_ids.reshape(-1)[places], places, self._ends)
        ids, sources, targets, kept, ends = (torch.from_numpy(array).to(self._device) for array in arrays)
        return Layout(ids, position_ids, attention_mask, sources, targets, kept, ends)
