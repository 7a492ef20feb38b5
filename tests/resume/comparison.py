"""Whether a continued run is the uninterrupted one: every number and file that a run leaves, but for what depends on the clock."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from core.run_directory import (
    CHECKPOINTS,
    EVENTS,
    MANIFEST,
    METRICS,
    OUTCOME,
    RESUME,
    RESUME_POINTS,
    SAMPLES,
    VARIABLE_METRICS,
    published,
    read_manifest,
    read_outcome,
)
from trainer.checkpoints import LEARNER, PENDING, WEIGHTS, state_digest

OF_THE_CLOCK = ("created_at", "attempts", "latency_seconds", "lengths", *VARIABLE_METRICS)
"""Beginnings of the names, at any depth, whose values may differ. `lengths` are bytes of files that hold such values."""

SHOWN = 6
ABSENT = "(absent)"


def differences(reference: Path, pieces: list[Path]) -> list[str]:
    """What a continued run has otherwise than the uninterrupted run in `reference`, one line each; empty where they are the same run.

    `pieces`: the run's directories in the order in which it went through them; each but the first began with what lies in its resume/.
    """
    last = pieces[-1]
    found = [
        *_all_different(METRICS, _lines([reference], METRICS), _lines(pieces, METRICS)),
        *_all_different(SAMPLES, _lines([reference], SAMPLES), _lines(pieces, SAMPLES)),
        *_all_different(EVENTS, _events([reference]), _events(pieces)),
        *_all_different(OUTCOME, _outcome(reference), _outcome(last)),
    ]
    for kind, contents in ((CHECKPOINTS, checkpoint_contents), (RESUME_POINTS, resume_point_contents)):
        expected, got = ({folder.name: contents(folder) for folder in published(place, kind)} for place in (reference, last))
        if len(pieces) > 1:  # What came before the newest resume point lies in the other directories.
            expected = {name: value for name, value in expected.items() if name in got or name == max(expected)}
        found += _all_different(kind, expected, got)
    return found


def checkpoint_contents(folder: Path) -> dict[str, Any]:
    """SHA-256 of every file, as it lies on the disk, with the manifest."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"on disk": digests, "manifest": read_manifest(folder).model_dump(mode="json")}


def resume_point_contents(folder: Path) -> dict[str, Any]:
    """The facts of the manifest, and the digest of weights, optimizers and rollouts sampled ahead, taken anew from the files."""
    files = {"weights": WEIGHTS, "learner": LEARNER, "pending": PENDING}
    state = {name: torch.load(folder / file, weights_only=True) for name, file in files.items()}
    return {"state": state_digest(state), "facts": read_manifest(folder).facts}


def last_digest(directory: Path) -> str:
    """Of the chain, at the end of the run."""
    return str([line["digest"] for line in _lines([directory], METRICS) if line["phase"] == "train"][-1])


def _lines(pieces: list[Path], name: str) -> list[Any]:
    """The lines of an output file over all pieces. A piece counts as far as the resume point knew it from which the next went on."""
    data = b""
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        whole = (piece / name).read_bytes() if (piece / name).exists() else b""
        data += whole if following is None else whole[: _known_length(following / RESUME, name)]
    return [json.loads(line, parse_float=str) for line in data.splitlines()]


def _known_length(point: Path, name: str) -> int:
    return int(read_manifest(point).facts["lengths"][name]) if point.exists() else 0


def _events(pieces: list[Path]) -> list[Any]:
    """All events but those that tell of a resume, whose number is the number of kills. One that says "not exact" stays in."""
    return [event for event in _lines(pieces, EVENTS) if event["data"].get("code") != "resumed"]


def _outcome(directory: Path) -> Any:
    outcome = read_outcome(directory)
    return None if outcome is None else outcome.model_dump(mode="json")


def _all_different(name: str, expected: Any, got: Any) -> list[str]:
    found = list(_different(name, expected, got))
    return found[:SHOWN] + ([f"{name}: {len(found) - SHOWN} more differences"] if len(found) > SHOWN else [])


def _different(where: str, expected: Any, got: Any) -> Iterator[str]:
    if isinstance(expected, list) and isinstance(got, list):
        expected, got = ({_label(number, part): part for number, part in enumerate(side)} for side in (expected, got))
    if not isinstance(expected, dict) or not isinstance(got, dict):
        if expected != got:
            yield f"{where}: {_short(expected)} in the uninterrupted run, {_short(got)} in the continued one"
        return
    for name in [*expected, *(name for name in got if name not in expected)]:
        if not name.startswith(OF_THE_CLOCK):
            yield from _different(f"{where} / {name}", expected.get(name, ABSENT), got.get(name, ABSENT))


def _label(number: int, part: Any) -> str:
    """The number of a line, from 1, with what makes it easier to find."""
    known = [f"{name} {part[name]}" for name in ("step", "phase", "prompt_index", "g", "name") if isinstance(part, dict) and name in part]
    return " ".join([f"{number + 1}", *known])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
