"""The shapes that flow through one step: prompt -> rollout -> batch -> estimate. Tensors and plain data, no behaviour beyond them.

Q prompts per step, G completions per prompt, B = Q * G rows, L prompt tokens, T completion tokens. Prompts are padded on
the left and completions on the right, so that column L is every row's first completion token. Row q * G + g is
completion g of prompt q: a group is G consecutive rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Prompt:
    """One training or validation row, rendered by the chat template."""

    index: int
    """Row number in its file, from 0: the `prompt` of the random counter and of every sample."""

    token_ids: tuple[int, ...]
    text: str
    """The rendered template, as shown with samples."""

    item: dict[str, Any]
    """The dataset row, as graders see it."""


@dataclass(frozen=True, eq=False)
class Support:
    """The tokens that could be sampled at each of n positions, where top_k, top_p or min_p leave out some: ragged rows of token ids.

    Tokens 3 and 7 at the first position, none at the second (nothing was sampled there) and token 5 at the third:
    offsets [0, 2, 2, 3], token_ids [3, 7, 5]. `vars(support)` are two plain tensors to save, `Support(**saved)` reads them back.
    """

    offsets: Tensor
    """[n + 1] int64: row i is token_ids[offsets[i] : offsets[i + 1]]."""

    token_ids: Tensor
    """[K] int32, ascending within a row."""

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> Self:
        """From the ids of each row. n tensors [k] -> n rows."""
        return cls(_offsets(torch.tensor([len(row) for row in rows])), torch.cat(list(rows)).int())

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of each part, one part after the other."""
        return cls(_offsets(torch.cat([part.lengths for part in parts])), torch.cat([part.token_ids for part in parts]))

    @property
    def lengths(self) -> Tensor:
        """[n] int64: tokens of each row."""
        return self.offsets.diff()

    def pad(self, num_rows: int) -> Self:
        """With empty rows behind, `num_rows` in all."""
        return type(self)(functional.pad(self.offsets, (0, num_rows + 1 - len(self.offsets)), value=len(self.token_ids)), self.token_ids)

    def select(self, rows: Tensor) -> Self:
        """The rows `rows` [m] (int64 indices, in any order). -> m rows."""
        lengths = self.lengths[rows]
        offsets = _offsets(lengths)
        size = int(offsets[-1])
        shifts = (self.offsets[rows] - offsets[:-1]).repeat_interleave(lengths, output_size=size)
        return type(self)(offsets, self.token_ids[torch.arange(size, device=rows.device) + shifts])

    def mask(self, vocabulary: int) -> Tensor:
        """[n, V] bool, True = in the row."""
        lengths = self.lengths
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(self.token_ids))
        mask = torch.zeros(len(lengths), vocabulary, dtype=torch.bool, device=lengths.device)
        mask[rows, self.token_ids.long()] = True
        return mask

    def to(self, device: torch.device) -> Self:
        return type(self)(self.offsets.to(device), self.token_ids.to(device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Support):
            return NotImplemented
        return torch.equal(self.offsets, other.offsets) and torch.equal(self.token_ids, other.token_ids)


@dataclass(frozen=True)
class Rollout:
    """One finished completion of one prompt."""

    prompt: Prompt
    g: int
    token_ids: tuple[int, ...]
    """Sampled tokens up to AND including the end token or the token that completed a stop string."""

    logprobs: tuple[float, ...]
    """log-probability of each sampled token under the distribution that sampled it (after temperature, over `support`); same length."""

    finish_reason: str
    """`stop` or `length`."""

    text: str
    """What the grader sees: without the end token and without the stop string."""

    support: Support | None = None
    """One row per sampled token: what could have been sampled in its place, itself included. None: every token of the vocabulary."""


@dataclass(frozen=True)
class Graded:
    """A rollout with its verdict, as grading returns it. `reward` None means failed or abstained, never 0."""

    rollout: Rollout
    reward: float | None
    sub_scores: dict[str, float] = field(default_factory=dict)
    explanation: str | None = None
    error: str | None = None
    """Stable code of the failure; None when graded or abstained."""

    error_message: str | None = None
    failed_member: str | None = None
    """The member of a multi grader to which `error` belongs."""

    attempts: int = 1
    latency_seconds: float = 0.0


@dataclass
class Batch:
    """All rows of one step (or, through `select`, of one minibatch of whole groups)."""

    prompt_ids: Tensor
    """[B, L] int64, left padded."""

    prompt_mask: Tensor
    """[B, L] bool, True = a prompt token."""

    completion_ids: Tensor
    """[B, T] int64, right padded."""

    completion_mask: Tensor
    """[B, T] bool, True = a sampled token that counts, up to and including the end token.

    "7 <end>" with T = 4: ids [7, end, pad, pad], mask [1, 1, 0, 0]. It may have holes; formulas move along the 1s only.
    """

    sampling_logprobs: Tensor
    """[B, T] float32, under the distribution that really sampled the token; 0 where the mask is 0."""

    rewards: Tensor
    """[B] float64, the grade of each whole completion, less its overlong penalty; where it has no grade 0, which is never used."""

    counts: Tensor
    """[B] bool, True = graded and not masked out. A row with False enters no statistic, loss term or denominator."""

    groups: Tensor
    """[B] int64, which prompt of the step (0..Q-1) the row belongs to; rows of a group are consecutive."""

    truncated: Tensor
    """[B] bool, finish_reason `length`."""

    support: Support | None = None
    """B * T rows, (b, t) at b * T + t, empty where the mask is 0: what every log-prob and entropy of the batch is normalised over.

    None: the whole vocabulary.
    """

    old_logprobs: Tensor | None = None
    """[B, T] float32, scored by the trainer's own forward pass with the weights that generated the rows."""

    reference_logprobs: Tensor | None = None
    """[B, T] float32, under the frozen reference model."""

    values: Tensor | None = None
    """[B, T] float32, the value head before the update, from the hidden state that predicts token t."""

    bootstrap_values: Tensor | None = None
    """[B] float32, recorded with `values`: of the state after the last token. None unless `truncation_bootstrap`.

    It takes the place of the grade where `truncated`; nothing reads the others, for those completions are over.
    """

    @property
    def token_counts(self) -> Tensor:
        """[B, T] bool: the tokens that enter losses and denominators, completion_mask and counts together."""
        return self.completion_mask & self.counts[:, None]

    def select(self, rows: Tensor) -> Self:
        """The rows `rows` [b] (int64 indices) of every tensor."""
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in vars(self).items() if name != "support"}
        if self.support is not None:
            length = self.completion_mask.shape[1]
            places = rows[:, None] * length + torch.arange(length, device=rows.device)
            chosen["support"] = self.support.select(places.flatten())
        return type(self)(**chosen)


@dataclass
class Scores:
    """What one forward pass of the current weights says about the completion tokens of b rows. 0 where the mask is 0."""

    logprobs: Tensor
    """[b, T] float32, of the sampled tokens, after temperature; with gradient in the update."""

    entropy: Tensor
    """[b, T] float32, of the distribution at each token (over the support), in nats; with gradient in the update."""

    values: Tensor | None = None
    """[b, T] float32, new values where the estimator needs them."""

    bootstrap_values: Tensor | None = None
    """[b] float32, as in `Batch`, with the new values."""


@dataclass
class Estimate:
    """What an advantage estimator makes of a batch."""

    advantages: Tensor
    """[B, T] float32, without gradient; 0 where `token_counts` is 0."""

    returns: Tensor | None
    """[B, T] float32 regression target of the value head; None without a value model."""

    batch_counts: Tensor
    """[B] bool: `Batch.counts` without the rows that the estimator leaves out (groups with fewer than 2 grades)."""

    statistics: dict[str, float] = field(default_factory=dict)
    """Fractions worth reporting, such as `zero_variance_group_fraction`."""

    def select(self, rows: Tensor) -> Self:
        """The rows `rows` [b] (int64 indices) of every tensor."""
        returns = None if self.returns is None else self.returns[rows]
        return type(self)(self.advantages[rows], returns, self.batch_counts[rows], self.statistics)


def _offsets(lengths: Tensor) -> Tensor:
    """[n] -> [n + 1]: where each row begins, and where the last one ends."""
    return functional.pad(lengths.cumsum(0), (1, 0))
