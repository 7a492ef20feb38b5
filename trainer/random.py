"""The only source of random numbers in training: Philox-4x32-10, a function of counters. No state, so nothing to save or to disturb.

Key = (seed, purpose and round), counter = (t, g, prompt, step): every token of every completion has its own number,
whatever else is in the batch. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a number is for, so that two uses never share one."""

    ROLLOUT = 1
    EVALUATION = 2
    MINIBATCH = 3
    INITIALISATION = 4
    DATA_ORDER = 5
    REPLACEMENT = 6
    PREFLIGHT = 7


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> NDArray[np.uint32]:
    """The four words of each counter. Four broadcastable integer arrays -> [4, ...] uint32."""
    words = [np.asarray(part).astype(np.uint64) & _WORD for part in counter]
    x0, x1, x2, x3 = np.broadcast_arrays(*words)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1 = (product1 >> _SHIFT) ^ x1 ^ np.uint64(k0), product1 & _WORD
        x2, x3 = (product0 >> _SHIFT) ^ x3 ^ np.uint64(k1), product0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


def uniforms(seed: int, purpose: Purpose, step: int, round_: int, prompts: ArrayLike, gs: ArrayLike, ts: ArrayLike) -> NDArray[np.float64]:
    """One number in [0, 1) per (prompt, g, t), with 53 random bits. Broadcastable integer arrays -> float64."""
    words = philox((ts, gs, prompts, step), _key(seed, purpose, round_)).astype(np.uint64)
    return _to_unit(words[0], words[1])


def permutation(seed: int, purpose: Purpose, step: int, round_: int, n: int) -> NDArray[np.int64]:
    """An order of 0..n-1. -> [n] int64."""
    keys = uniforms(seed, purpose, step, round_, np.arange(n), 0, 0)
    return np.argsort(keys, kind="stable").astype(np.int64)


def normals(seed: int, purpose: Purpose, stream: int, n: int) -> NDArray[np.float64]:
    """`n` standard normal numbers of the stream `stream` (one per tensor to initialise). Source: Box and Muller 1958. -> [n] float64."""
    pairs = np.arange((n + 1) // 2)
    words = philox((pairs, 0, stream, 0), _key(seed, purpose, 0)).astype(np.uint64)
    radius = np.sqrt(-2.0 * np.log1p(-_to_unit(words[0], words[1])))
    angle = 2.0 * np.pi * _to_unit(words[2], words[3])
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:n]


def _key(seed: int, purpose: Purpose, round_: int) -> tuple[int, int]:
    if not (0 <= seed < 2**32 and 0 <= round_ < 2**24):
        raise ValueError(f"seed must be in [0, 2**32) and round in [0, 2**24), not {seed} and {round_}")
    return seed, (int(purpose) << 24) | round_


def _to_unit(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.float64]:
    """27 and 26 bits of two words as one number in [0, 1)."""
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53
