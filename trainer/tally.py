"""Averages with an honest denominator: sums and counts, added up over any split of a batch and divided once."""

from torch import Tensor


class Tally:
    """Named (sum, count) pairs and maxima. Numbers stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        known_total, known_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (known_total + _detached(total), known_count + _detached(count))

    def add_tokens(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Sum of `values` where `mask` is 1, over the number of 1s."""
        self.add(name, values.detach().masked_fill(~mask, 0.0).double().sum(), mask.sum())

    def maximum(self, name: str, value: Tensor) -> None:
        known = self._maxima.get(name)
        self._maxima[name] = value.detach() if known is None else known.maximum(value.detach())

    def results(self) -> dict[str, float]:
        """Sum / count of every name with a count, and the maxima."""
        means = {name: float(total) / float(count) for name, (total, count) in self._sums.items() if float(count) > 0}
        return means | {name: float(value) for name, value in self._maxima.items()}


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value
