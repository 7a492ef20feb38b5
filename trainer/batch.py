"""The shapes that flow through one step: prompt -> rollout -> batch -> estimate. Tensors and plain data, no behaviour beyond them.

Q prompts per step, G completions per prompt, B = Q * G rows, L prompt tokens, T completion tokens. Prompts are padded on
the left and completions on the right, so that column L is every row's first completion token. Row q * G + g is
completion g of prompt q: a group is G consecutive rows.
"""

from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor


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


@dataclass(frozen=True)
class Rollout:
    """One finished completion of one prompt."""

    prompt: Prompt
    g: int
    token_ids: tuple[int, ...]
    """Sampled tokens up to AND including the end token or the token that completed a stop string."""

    logprobs: tuple[float, ...]
    """log-probability of each sampled token under the distribution that sampled it (after temperature); same length."""

    finish_reason: str
    """`stop` or `length`."""

    text: str
    """What the grader sees: without the end token and without the stop string."""


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
    """[B] float64, the grade of each whole completion; 0 where `counts` is 0 (and never used there)."""

    counts: Tensor
    """[B] bool, True = graded and not masked out. A row with False enters no statistic, loss term or denominator."""

    groups: Tensor
    """[B] int64, which prompt of the step (0..Q-1) the row belongs to; rows of a group are consecutive."""

    truncated: Tensor
    """[B] bool, finish_reason `length`."""

    old_logprobs: Tensor | None = None
    """[B, T] float32, scored by the trainer's own forward pass with the weights that generated the rows."""

    reference_logprobs: Tensor | None = None
    """[B, T] float32, under the frozen reference model."""

    values: Tensor | None = None
    """[B, T] float32, the value head before the update, from the hidden state that predicts token t."""

    @property
    def token_counts(self) -> Tensor:
        """[B, T] bool: the tokens that enter losses and denominators, completion_mask and counts together."""
        return self.completion_mask & self.counts[:, None]

    def select(self, rows: Tensor) -> Self:
        """The rows `rows` [b] (int64 indices) of every tensor."""
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in vars(self).items()}
        return type(self)(**chosen)


@dataclass
class Scores:
    """What one forward pass of the current weights says about the completion tokens of b rows. 0 where the mask is 0."""

    logprobs: Tensor
    """[b, T] float32, of the sampled tokens, after temperature; with gradient in the update."""

    entropy: Tensor
    """[b, T] float32, of the distribution at each token, in nats; with gradient in the update."""

    values: Tensor | None = None
    """[b, T] float32, new values where the estimator needs them."""


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
