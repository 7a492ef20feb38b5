"""Batches made by hand, for tests of formulas."""

import torch
from torch import Tensor

from core.options import Options
from trainer.advantages import make_estimator
from trainer.batch import Batch


def make_batch(
    rewards: list[float],
    masks: list[list[int]],
    groups: list[int],
    *,
    counts: list[bool] | None = None,
    values: Tensor | None = None,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    sampling: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    mask = torch.tensor(masks, dtype=torch.bool)
    num_rows, length = mask.shape
    return Batch(
        prompt_ids=torch.ones(num_rows, 2, dtype=torch.int64),
        prompt_mask=torch.ones(num_rows, 2, dtype=torch.bool),
        completion_ids=torch.ones(num_rows, length, dtype=torch.int64),
        completion_mask=mask,
        sampling_logprobs=torch.zeros(num_rows, length, dtype=dtype) if sampling is None else sampling,
        rewards=torch.tensor(rewards, dtype=torch.float64),
        counts=torch.ones(num_rows, dtype=torch.bool) if counts is None else torch.tensor(counts),
        groups=torch.tensor(groups),
        truncated=torch.zeros(num_rows, dtype=torch.bool),
        old_logprobs=old,
        reference_logprobs=reference,
        values=values,
    )


def group_advantages(rewards: list[float], group_size: int, counts: list[bool] | None = None, **options: object) -> list[float]:
    """The advantage of each of one-token completions in consecutive groups."""
    batch = make_batch(rewards, [[1]] * len(rewards), [i // group_size for i in range(len(rewards))], counts=counts)
    advantages: list[float] = make_estimator(Options(kl_coefficient=0.0, **options))(batch, 0.0).advantages[:, 0].tolist()
    return advantages


def random_masks(num_rows: int, length: int, generator: torch.Generator, *, holes: bool = True) -> list[list[int]]:
    """Right padded rows of 1 to `length` tokens, some with holes; the first and last token of a row always count."""
    masks = []
    for _ in range(num_rows):
        used = int(torch.randint(1, length + 1, (1,), generator=generator))
        row = [1] * used + [0] * (length - used)
        for t in range(1, used - 1):
            if holes and torch.rand((), generator=generator) < 0.25:
                row[t] = 0
        masks.append(row)
    return masks
