"""Rank correlations against tables of the literature, a slow definition and what must hold of every correlation."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from housekeeping.agreement import average_ranks, kendall, spearman

SCORES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=0, max_size=12)


def ranks_by_counting(values: list[float]) -> list[float]:
    """A value's rank: how many are below it, and half of those equal to it (itself included), plus one half."""
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]


def spearman_by_definition(x: list[float], y: list[float]) -> float | None:
    a, b = ([Fraction(rank) for rank in ranks_by_counting(values)] for values in (x, y))
    mean = Fraction(len(a) + 1, 2)
    products = sum((i - mean) * (j - mean) for i, j in zip(a, b, strict=True))
    squares = sum((i - mean) ** 2 for i in a) * sum((j - mean) ** 2 for j in b)
    return None if squares == 0 else float(products) / math.sqrt(squares)


def kendall_by_definition(x: list[float], y: list[float]) -> float | None:
    """tau-b = (P - Q) / sqrt((P + Q + X0) (P + Q + Y0)): concordant, discordant, tied only in x, tied only in y."""
    p = q = x0 = y0 = 0
    for i in range(len(x)):
        for j in range(i):
            product = (x[i] - x[j]) * (y[i] - y[j])
            p, q = p + (product > 0), q + (product < 0)
            x0 += x[i] == x[j] and y[i] != y[j]
            y0 += y[i] == y[j] and x[i] != x[j]
    under = (p + q + x0) * (p + q + y0)
    return None if under == 0 else (p - q) / math.sqrt(under)


@given(SCORES)
def test_both_equal_their_slow_definitions(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    assert average_ranks(x) == ranks_by_counting(x)
    for fast, slow in ((spearman, spearman_by_definition), (kendall, kendall_by_definition)):
        wanted = slow(x, y)
        assert fast(x, y) == (None if wanted is None else pytest.approx(wanted, abs=1e-12))


def test_hand_computed_example() -> None:
    """Hours of television against IQ, rho = -29/165: the worked example of Wikipedia's article on Spearman's coefficient."""
    iq = [106.0, 100.0, 86.0, 101.0, 99.0, 103.0, 97.0, 113.0, 112.0, 110.0]
    hours = [7.0, 27.0, 2.0, 50.0, 28.0, 29.0, 20.0, 12.0, 6.0, 17.0]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert kendall([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(4 / 6)
    assert kendall([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / math.sqrt(2 * 3))


def test_same_order_is_one_reversed_is_minus_one_and_no_order_is_none() -> None:
    x = [0.1, 0.2, 0.7, 0.9]
    for correlation in (spearman, kendall):
        assert correlation(x, [10 * value**3 for value in x]) == pytest.approx(1.0)
        assert correlation(x, [-value for value in x]) == pytest.approx(-1.0)
        assert correlation(x, [0.5] * 4) is None
        assert correlation([], []) is None
