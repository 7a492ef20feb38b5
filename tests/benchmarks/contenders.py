"""Contenders that do nothing, in a file that is quick to import in a new process."""

import itertools
import os

from benchmarks.contender import Track


def count_steps(track: Track, first: int) -> None:
    """Step n takes n seconds of forward pass and n tokens, counted from `first`."""
    track.ready({"pid": os.getpid()})
    for number in itertools.count(first):
        track.finish_step({"forward": float(number)}, tokens=number, peak_bytes=1)


def fail(track: Track) -> None:
    raise ValueError("no model here")
