"""How far two computations of the same numbers may lie apart: one table for preflight, tests and docs/preflight.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
"""(computed, expected), tensors of like shapes in pairs -> how far they are apart, 0 where they are equal."""


@dataclass(frozen=True)
class Bound:
    """`measure` may be at most `allowed`."""

    measure: Measure
    in_words: str
    """What `measure` computes, as messages and docs say it."""

    allowed: float
    """At temperature 1."""

    def allowed_at(self, scale: float) -> float:
        """What is allowed where rounding errors weigh 1 / `scale` times as much as at temperature 1. `scale` is in (0, 1]."""
        return self.allowed / scale


@dataclass(frozen=True)
class Tolerances:
    """The bounds of one precision."""

    logprobs: Bound
    """Of the same tokens, computed in two ways: by sampler and trainer, or with and without padding."""

    first_ratio: Bound
    """Of the ratio in the first pass of an update, which should be 1."""

    gradient: Bound
    """Of one minibatch, split into microbatches in two ways."""


def largest_difference(computed: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(computed, expected, strict=True))


def mean_difference(computed: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return float(torch.cat([(ours - theirs).abs() for ours, theirs in zip(computed, expected, strict=True)]).mean())


def difference_of_means(computed: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return float((torch.cat(list(computed)).mean() - torch.cat(list(expected)).mean()).abs())


def relative_difference(computed: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|computed - expected| / |expected|; 1 where `expected` is 0, because nothing can be said of a gradient that is not there."""
    length = squared_norm(expected)
    return float((squared_norm(_differences(computed, expected)) / length) ** 0.5) if length else 1.0


def cosine_difference(computed: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|a - b|^2 / (|a|^2 + |b|^2): 1 - cosine of two vectors of equal length, and more where lengths differ, to which a cosine is blind.

    1 where both are 0.
    """
    lengths = squared_norm(computed) + squared_norm(expected)
    return squared_norm(_differences(computed, expected)) / lengths if lengths else 1.0


def squared_norm(tensors: Sequence[Tensor]) -> float:
    """Of all numbers of `tensors` together, summed in float64."""
    return sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in tensors)


def _differences(computed: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Tensor]:
    return [ours - theirs for ours, theirs in zip(computed, expected, strict=True)]


TOLERANCES = {
    "float32": Tolerances(
        logprobs=Bound(largest_difference, "the largest difference of two log-probs", 1e-4),
        first_ratio=Bound(largest_difference, "the largest difference of a ratio from 1", 0.0),
        gradient=Bound(relative_difference, "the length of the difference of two gradients over that of the gradient", 1e-5),
    ),
    "bf16": Tolerances(
        logprobs=Bound(mean_difference, "the mean difference of two log-probs", 0.05),
        first_ratio=Bound(difference_of_means, "the difference of the mean ratio from 1", 0.01),
        gradient=Bound(cosine_difference, "1 - cosine of two gradients, more where their lengths differ", 0.02),
    ),
}
"""By `precision`."""
