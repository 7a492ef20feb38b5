"""How the rows of a microbatch lie in one forward pass, and which rows go together. Shapes in, index tensors out; knows no model.

`packed`: all groups in one row without padding, each with its prompt once and every completion behind it; a completion sees the
prompt and itself. `padded`: one row per completion, prompt and completion, padded on the right, where a causal model never looks.
A completion ends at the last 1 of its mask; tokens in holes before that are context without being scored.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batch import Batch

_SHORTEST_CLASS = 4
"""Stretches of up to 2**4 tokens attend together; beyond, those between one power of two and the next."""


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
class Block:
    """n stretches of tokens that attend in one product, padded to T queries and K keys: first a prompt's keys, then their own."""

    queries: Tensor
    """[n, T] int64 into S."""

    keys: Tensor
    """[n, K] int64 into S."""

    mask: Tensor
    """[n or 1, 1, T, K], 0 where the query sees the key and -inf elsewhere."""


@dataclass(frozen=True)
class Sharing:
    """Who sees whom in a packed row: every token its group's prompt, kept once, and what came before it in its own stretch."""

    blocks: tuple[Block, ...]
    order: Tensor
    """[S] int64: where each token lies in the blocks' n * T queries, one block after the other."""


@dataclass(frozen=True)
class Layout:
    """One forward pass over R rows of S tokens, in which N completion tokens are scored."""

    input_ids: Tensor
    """[R, S] int64; R is 1 where rows are packed."""

    position_ids: Tensor | None
    """[R, S] int64; every completion goes on from its prompt. None: plain 0..S-1."""

    sharing: Sharing | None
    """None: plain causal attention."""

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


def num_tokens(groups: list[Group], packs: bool) -> int:
    """Tokens of one forward pass over `groups`, padding included."""
    if packs:
        return sum(group.packed_length for group in groups)
    return sum(len(group.rows) for group in groups) * max(group.padded_length for group in groups)


def plan_microbatches(groups: list[Group], microbatch_tokens: int, packs: bool) -> list[list[Group]]:
    """Whole groups of like length together, longest first, at most `microbatch_tokens` each (one group at least)."""
    plan: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: -group.packed_length):
        joined = [*plan[-1], group] if plan else [group]
        if plan and num_tokens(joined, packs) <= microbatch_tokens:
            plan[-1] = joined
        else:
            plan.append([group])
    return plan


def pack(batch: Batch, groups: list[Group], dtype: torch.dtype) -> Layout:
    """All groups in one row; the masks have `dtype`."""
    arrays = _Arrays(batch, 1, num_tokens(groups, packs=True))
    stretches, start = [], 0
    for group in groups:
        arrays.put_prompt(0, start, group.rows[0], group.prompt_length)
        prompt = _Stretch(start, group.prompt_length)
        stretches.append(prompt)
        start += group.prompt_length
        for member, length in zip(group.rows, group.completion_lengths, strict=True):
            arrays.put_completion(0, start, member, length, prompt)
            if length:
                stretches.append(_Stretch(start, length, prompt))
            start += length
    device = batch.completion_ids.device
    return arrays.finish(torch.from_numpy(arrays.positions).to(device), _share(stretches, start, dtype, device))


def pad(batch: Batch, groups: list[Group]) -> Layout:
    """One row per completion."""
    width = max(group.padded_length for group in groups)
    arrays = _Arrays(batch, sum(len(group.rows) for group in groups), width)
    row = 0
    for group in groups:
        for member, length in zip(group.rows, group.completion_lengths, strict=True):
            arrays.put_prompt(row, 0, member, group.prompt_length)
            arrays.put_completion(row, group.prompt_length, member, length, _Stretch(0, group.prompt_length))
            row += 1
    return arrays.finish(None, None)


@dataclass(frozen=True)
class _Stretch:
    """Consecutive tokens of one prompt or one completion."""

    start: int
    length: int
    prompt: "_Stretch | None" = None

    @property
    def length_class(self) -> tuple[int, int]:
        prompt = 0 if self.prompt is None else _length_class(self.prompt.length)
        return prompt, _length_class(self.length)


def _length_class(length: int) -> int:
    return max(_SHORTEST_CLASS, (length - 1).bit_length())


def _share(stretches: list[_Stretch], width: int, dtype: torch.dtype, device: torch.device) -> Sharing:
    alike = defaultdict(list)
    for stretch in stretches:
        alike[stretch.length_class].append(stretch)
    blocks, order, offset = [], np.zeros(width, np.int64), 0
    for _, members in sorted(alike.items()):
        block = _block(members, dtype, device)
        blocks.append(block)
        for stretch in members:
            order[stretch.start : stretch.start + stretch.length] = offset + np.arange(stretch.length)
            offset += block.queries.shape[1]
    return Sharing(tuple(blocks), torch.from_numpy(order).to(device))


def _block(members: list[_Stretch], dtype: torch.dtype, device: torch.device) -> Block:
    """Places beyond a stretch's end hold its last token once more: as queries nobody reads them, as keys only those queries see them."""
    starts, lengths = (np.array([getattr(stretch, name) for stretch in members]) for name in ("start", "length"))
    prompts = [stretch.prompt or _Stretch(stretch.start, 0) for stretch in members]
    prompt_starts, prompt_lengths = (np.array([getattr(prompt, name) for prompt in prompts]) for name in ("start", "length"))
    num_shared, num_queries = int(prompt_lengths.max()), int(lengths.max())
    shared, own = np.arange(num_shared), np.arange(num_queries)
    queries = starts[:, None] + np.minimum(own, lengths[:, None] - 1)
    keys = np.concatenate([prompt_starts[:, None] + np.minimum(shared, prompt_lengths[:, None] - 1), queries], 1)
    if (prompt_lengths == num_shared).all():
        prompt_lengths = prompt_lengths[:1]
    sees_prompt = np.broadcast_to(shared < prompt_lengths[:, None, None], (len(prompt_lengths), num_queries, num_shared))
    sees_own = np.broadcast_to(own <= own[:, None], (len(prompt_lengths), num_queries, num_queries))
    sees = torch.from_numpy(np.concatenate([sees_prompt, sees_own], 2)).to(device)[:, None]
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))
    return Block(torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device), mask)


class _Arrays:
    """The growing arrays of a layout of `rows` x `width` tokens."""

    def __init__(self, batch: Batch, rows: int, width: int) -> None:
        self._device = batch.completion_ids.device
        self._prompt_ids = batch.prompt_ids.cpu().numpy()
        self._completion_ids = batch.completion_ids.cpu().numpy()
        self._mask = batch.completion_mask.cpu().numpy()
        self._ids = np.zeros((rows, width), np.int64)
        self.positions = np.zeros((rows, width), np.int64)
        self._sources: list[NDArray[np.int64]] = []
        self._places: list[NDArray[np.int64]] = []
        self._ends = np.zeros(len(self._mask), np.int64)

    def put_prompt(self, row: int, start: int, member: int, length: int) -> None:
        self._ids[row, start : start + length] = self._prompt_ids[member, self._prompt_ids.shape[1] - length :]
        self.positions[row, start : start + length] = np.arange(length)

    def put_completion(self, row: int, start: int, member: int, length: int, prompt: _Stretch) -> None:
        end, prompt_end = start + length, prompt.start + prompt.length
        self._ids[row, start:end] = self._completion_ids[member, :length]
        self.positions[row, start:end] = prompt.length + np.arange(length)
        scored = np.flatnonzero(self._mask[member, :length])
        before = np.where(scored > 0, start + scored - 1, prompt_end - 1)
        width = self._ids.shape[1]
        self._sources.append(row * width + before)
        self._ends[member] = row * width + (end if length else prompt_end) - 1
        self._places.append(member * self._mask.shape[1] + scored)

    def finish(self, position_ids: Tensor | None, sharing: Sharing | None) -> Layout:
        places = np.concatenate(self._places)
        arrays = (self._ids, np.concatenate(self._sources), self._completion_ids.reshape(-1)[places], places, self._ends)
        ids, sources, targets, kept, ends = (torch.from_numpy(array).to(self._device) for array in arrays)
        return Layout(ids, position_ids, sharing, sources, targets, kept, ends)
