"""Seconds of the phases of a step, by wrapping the functions that do them, and memory. A GPU is waited for at both ends."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PHASES = ("generation", "scoring", "forward", "backward", "optimizer")
"""`scoring` is rewards and what has to be known before the update; `optimizer` is clipping, stepping and the update's statistics."""


class PhaseClock:
    """Adds up until it is taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time counted for `phase`."""

        def wrapper(*arguments: Any, **named: Any) -> Any:
            start = now()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + now() - start

        return wrapper

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The most that this process has held so far: of the GPU's memory where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def time_backward(clock: PhaseClock) -> None:
    """From now on in this process every `Tensor.backward` counts for `backward`."""
    torch.Tensor.backward = clock.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
