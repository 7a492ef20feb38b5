"""Before anything is timed: both contenders take the same tokens and rewards in float32 to the same gradient."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Contender
from benchmarks.ours import save_gradients
from benchmarks.workload import Workload

LARGEST_DIFFERENCE = 1e-3
"""Norm of the difference of the gradients, over the norm of ours."""
CHECK_MICRO_BATCH = 8


class ContendersDiffer(Exception):
    """They do not compute the same thing: their times cannot be compared."""


def check_gradients(workload: Workload, log: Path, save_peer_gradients: Callable[..., None]) -> str:
    """What was found, in a sentence. Our side samples; the peer takes its tokens and rewards. Raises: ContendersDiffer."""
    workload = replace(workload, precision="float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Contender("ours, gradients", log, save_gradients, workload, folder) as ours:
            facts = ours.facts
        with Contender("peer, gradients", log, save_peer_gradients, workload, CHECK_MICRO_BATCH, folder, facts) as peer:
            counts = {"ours": facts["trained_tokens"], "peer": peer.facts["trained_tokens"]}
        gradients = [torch.load(folder / file, mmap=True) for file in ("ours.pt", "peer.pt")]
        difference = relative_difference(*gradients)
    said = f"relative difference of the gradients {difference:.1e} (allowed {LARGEST_DIFFERENCE:.0e}), trained tokens {counts}"
    if counts["ours"] != counts["peer"] or not difference <= LARGEST_DIFFERENCE:
        raise ContendersDiffer(said)
    return said


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """|ours - theirs| / |ours| over all parameters together. Raises: ContendersDiffer where they are not of the same parameters."""
    if ours.keys() != theirs.keys():
        raise ContendersDiffer(f"gradients of different parameters: {sorted(ours.keys() ^ theirs.keys())[:4]}")

    def norm(tensors: Any) -> float:
        return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())

    return norm(ours[name] - theirs[name] for name in ours) / norm(ours.values())
