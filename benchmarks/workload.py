"""What both contenders of a race do: the same prompts, the same completion lengths, the same reward, the same loss."""

import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.demo.prompts import Row, make_rows

NUM_PROMPTS, GROUP_SIZE = 4, 8
FIXED_LENGTH = 64
LONGEST = 128
_MEAN_BEFORE_CUT = 40.0
_LENGTHS_SEED = 37
LEARNING_RATE = 1e-6
BETAS = (0.9, 0.95)
LORA_RANK, LORA_ALPHA = 16, 32.0

Lengths = Literal["fixed", "drawn"]
Precision = Literal["bf16", "amp", "float32"]
"""bf16: ours computes in bf16 with float32 weights, the peer holds everything in bf16. amp: both hold float32 and compute in bf16."""


@dataclass(frozen=True)
class Workload:
    """One race's work."""

    model: Path
    lengths: tuple[int, ...]
    """Of the completions, one for each row: completion g of the step's prompt q has lengths[q * GROUP_SIZE + g] tokens."""

    finetuning: Literal["full", "lora"]
    precision: Precision
    num_threads: int


def completion_lengths(kind: Lengths) -> tuple[int, ...]:
    """Tokens of each completion. Drawn: geometric, cut at 128, mean about 38, drawn once and for all."""
    count = NUM_PROMPTS * GROUP_SIZE
    return (FIXED_LENGTH,) * count if kind == "fixed" else draw_lengths(count, _LENGTHS_SEED)


def draw_lengths(count: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed).random
    rate = math.log1p(-1 / _MEAN_BEFORE_CUT)
    return tuple(min(LONGEST, math.ceil(math.log1p(-draw()) / rate) or 1) for _ in range(count))


def prompt_rows() -> list[Row]:
    """The prompts of every step, as chat messages."""
    return make_rows()[0][:NUM_PROMPTS]


def reward(text: str) -> float:
    """Between 0 and 1, by the text alone and different for different texts: every group has something to learn."""
    return zlib.crc32(text.encode()) / 2**32
