import math

import pytest
import torch
from torch import Tensor

from trainer.tolerances import (
    TOLERANCES,
    cosine_difference,
    difference_of_means,
    largest_difference,
    mean_difference,
    relative_difference,
)

EXPECTED = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])]
COMPUTED = [torch.tensor([1.5, 2.0]), torch.tensor([3.0, 4.0, 3.0])]


def turned(angle: float, length: float = 1.0) -> list[Tensor]:
    return [torch.tensor([length * math.cos(angle)]), torch.tensor([length * math.sin(angle)])]


def test_measures_are_taken_over_all_numbers_together() -> None:
    assert largest_difference(COMPUTED, EXPECTED) == 2.0
    assert mean_difference(COMPUTED, EXPECTED) == 0.5
    assert difference_of_means(COMPUTED, EXPECTED) == pytest.approx(0.3)
    assert relative_difference(COMPUTED, EXPECTED) == pytest.approx(math.sqrt(4.25 / 55))


@pytest.mark.parametrize("angle", [0.0, 0.03, 1.0, math.pi])
def test_between_vectors_of_equal_length_the_gradient_measure_is_one_minus_cosine(angle: float) -> None:
    assert cosine_difference(turned(angle), turned(0.0)) == pytest.approx(1 - math.cos(angle), abs=1e-7)


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0, 4.0])
def test_a_gradient_of_another_length_is_not_the_same(factor: float) -> None:
    assert cosine_difference(turned(0.0, factor), turned(0.0)) == pytest.approx((factor - 1) ** 2 / (factor**2 + 1), rel=1e-5)
    assert cosine_difference(turned(0.0, factor), turned(0.0)) > TOLERANCES["bf16"].gradient.allowed


@pytest.mark.parametrize("measure", [relative_difference, cosine_difference])
def test_where_there_is_no_gradient_nothing_is_confirmed(measure: object) -> None:
    assert callable(measure)
    assert measure([torch.zeros(2)], [torch.zeros(2)]) == 1.0


def test_below_temperature_one_bounds_widen_with_the_rounding_of_the_logits() -> None:
    """A rounding error d of a logit is d / T in the log-prob."""
    assert TOLERANCES["float32"].logprobs.allowed_at(0.5) == pytest.approx(2e-4)
    assert TOLERANCES["bf16"].logprobs.allowed_at(0.5) == pytest.approx(0.1)
    assert TOLERANCES["bf16"].gradient.allowed_at(0.5) == pytest.approx(0.04)
    assert TOLERANCES["float32"].first_ratio.allowed_at(0.5) == 0.0
