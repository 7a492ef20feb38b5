"""How far two graders agree on the order of the same completions. Pure functions over two lists of equal length."""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations


def average_ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1, lowest first; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho, from -1 to 1: Pearson's correlation of the average ranks. None where one of them has no order."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(average_ranks(x), average_ranks(y))


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b, from -1 to 1. None where one of them has no order. Looks at every pair: for thousands of values.

    Source: Kendall 1945, "The treatment of ties in ranking problems".
    """
    balance = untied_x = untied_y = 0
    for (x1, y1), (x2, y2) in combinations(zip(x, y, strict=True), 2):
        dx, dy = (x1 > x2) - (x1 < x2), (y1 > y2) - (y1 < y2)
        balance += dx * dy
        untied_x += dx != 0
        untied_y += dy != 0
    return balance / math.sqrt(untied_x * untied_y) if untied_x and untied_y else None
