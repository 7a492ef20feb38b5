"""From rows to prompts, and the order in which a run goes through them: a pure function of (seed, epoch). Samples nothing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import InvalidRequest
from core.options import Options
from core.rows import parse_row
from core.run_directory import iter_rows
from trainer.batch import Batch, Graded, Prompt, Rollout, Support
from trainer.random import Purpose, permutation
from trainer.tokens import render_prompt


def load_prompts(path: Path, param: str, tokenizer: Any, max_tokens: int, reasoning_effort: str) -> list[Prompt]:
    """Every row of `path` rendered by the chat template. `param` is training_file or validation_file.

    Raises: InvalidRequest naming the line of a row that cannot be parsed or rendered, or (`prompt_too_long`) has more than `max_tokens`.
    """
    prompts: list[Prompt] = []
    for number, line in iter_rows(path):
        row = parse_row(line, number, param)
        item = row.item
        try:
            text, token_ids = render_prompt(tokenizer, item["messages"], reasoning_effort=reasoning_effort)
        except InvalidRequest as error:
            raise InvalidRequest(f"Line {number} of {param}: {error.message}", code=error.code, param=error.param) from error
        if len(token_ids) > max_tokens:
            message = f"Line {number} of {param} has {len(token_ids)} prompt tokens; at most {max_tokens} fit."
            raise InvalidRequest(message, code="prompt_too_long", param=param)
        prompts.append(Prompt(len(prompts), token_ids, text, item))
    return prompts


class PromptOrder:
    """Rows in shuffled epochs that stream on without a gap; no row stands twice in a step.

    Where a step spans two epochs, rows that its first part already holds move behind the step in the second epoch.
    """

    def __init__(self, seed: int, num_rows: int, batch_size: int) -> None:
        if not 1 <= batch_size <= num_rows:
            raise ValueError(f"a step of {batch_size} prompts needs at least as many rows, not {num_rows}")
        self._seed, self._num_rows, self._batch_size = seed, num_rows, batch_size
        self._epoch, self._order = 0, self._shuffled(0)

    def rows(self, step: int) -> list[int]:
        """The rows of step `step` (from 1), in order."""
        start = (step - 1) * self._batch_size
        return [self._row_at(position) for position in range(start, start + self._batch_size)]

    def other_rows(self, step: int, round_: int, tried: set[int]) -> list[int]:
        """Every row that is not in `tried`, in an order of its own for each round of each step."""
        order: list[int] = permutation(self._seed, Purpose.REPLACEMENT, step, round_, self._num_rows).tolist()
        return [row for row in order if row not in tried]

    def _row_at(self, position: int) -> int:
        epoch, place = divmod(position, self._num_rows)
        if epoch < self._epoch:
            self._epoch, self._order = 0, self._shuffled(0)
        while self._epoch < epoch:
            self._epoch += 1
            self._order = self._follow(self._order, self._epoch)
        return self._order[place]

    def _follow(self, previous: list[int], epoch: int) -> list[int]:
        """The order of `epoch`, given the one before it."""
        order = self._shuffled(epoch)
        already_filled = epoch * self._num_rows % self._batch_size
        if already_filled == 0:
            return order
        taken = set(previous[-already_filled:])
        rest_of_step = [row for row in order if row not in taken][: self._batch_size - already_filled]
        return rest_of_step + [row for row in order if row not in set(rest_of_step)]

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = permutation(self._seed, Purpose.DATA_ORDER, epoch, 0, self._num_rows).tolist()
        return order


def collate(graded: list[Graded], options: Options, device: torch.device) -> Batch:
    """The rows of one step as tensors. `graded` is ordered by prompt, then g; a row without a reward counts for nothing."""
    rollouts = [entry.rollout for entry in graded]
    truncated = torch.tensor([rollout.finish_reason == "length" for rollout in rollouts])
    is_graded = torch.tensor([entry.reward is not None for entry in graded])
    prompt_ids, prompt_mask = _padded([rollout.prompt.token_ids for rollout in rollouts], left=True)
    completion_ids, completion_mask = _padded([rollout.token_ids for rollout in rollouts], left=False)
    logprobs = torch.zeros(completion_ids.shape, dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        logprobs[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    support = _joined_support(rollouts, completion_ids.shape[1])
    numbers = {index: place for place, index in enumerate(dict.fromkeys(rollout.prompt.index for rollout in rollouts))}
    return Batch(
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        completion_ids=completion_ids.to(device),
        completion_mask=completion_mask.to(device),
        sampling_logprobs=logprobs.to(device),
        rewards=torch.tensor([training_reward(entry, options) for entry in graded], dtype=torch.float64, device=device),
        counts=(is_graded & ~(truncated & options.mask_truncated)).to(device),
        groups=torch.tensor([numbers[rollout.prompt.index] for rollout in rollouts], device=device),
        truncated=truncated.to(device),
        support=None if support is None else support.to(device),
    )


def training_reward(entry: Graded, options: Options) -> float:
    """The grade less its overlong penalty; 0 without a grade, where it is never used."""
    if entry.reward is None:
        return 0.0
    return entry.reward - overlong_penalty(len(entry.rollout.token_ids), options)


def overlong_penalty(num_tokens: int, options: Options) -> float:
    """0 up to the last `overlong_penalty` of `max_completion_tokens`, from there on rising linearly to 1.

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476 equation 13.
    """
    if options.overlong_penalty == 0.0:
        return 0.0
    soft = options.overlong_penalty * options.max_completion_tokens
    return max(0.0, (num_tokens - (options.max_completion_tokens - soft)) / soft)


def _joined_support(rollouts: list[Rollout], length: int) -> Support | None:
    """`length` rows per rollout, the last ones of a shorter completion empty. None where sampling was not restricted."""
    supports = [rollout.support for rollout in rollouts if rollout.support is not None]
    assert len(supports) in (0, len(rollouts)), "one step has one sampling"
    return Support.concatenate([support.pad(length) for support in supports]) if supports else None


def _padded(rows: list[tuple[int, ...]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, longest] padded with 0, and the mask that is True on the rows' own tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = True
    return ids, mask
