"""The comparison must see every difference that a wrong resume could make: here runs are spoilt one thing at a time."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.run_directory import (
    CHECKPOINTS,
    EVENTS,
    MANIFEST,
    METRICS,
    OUTCOME,
    RESUME,
    RESUME_POINTS,
    SAMPLES,
    End,
    FileEntry,
    publish_json,
    published,
    read_manifest,
    read_outcome,
)
from tests.resume.comparison import differences
from tests.resume.processes import successor
from tests.resume.settings import Setting, make_directory
from tests.trainer.runs import train_here
from trainer.checkpoints import LEARNER

SETTING = Setting("ppo", "lora", 0)
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_directory(tmp_path_factory.mktemp("reference") / "run", SETTING)
    train(directory)
    return directory


def train(directory: Path) -> None:
    outcome = train_here(directory)
    assert outcome.end is End.SUCCEEDED
    publish_json(directory / OUTCOME, outcome)


def edit_lines(name: str, edit: Callable[[list[dict[str, Any]]], object]) -> Spoil:
    def spoil(directory: Path) -> None:
        lines = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        edit(lines)
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return spoil


def nudge(state: Any) -> bool:
    """Adds 1 to the first number of the first tensor found."""
    if isinstance(state, torch.Tensor):
        state.view(-1)[0] += 1
        return True
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return any(nudge(part) for part in parts)


def nudge_optimizer(point: Path) -> None:
    state = torch.load(point / LEARNER, weights_only=True)
    assert nudge(state)
    torch.save(state, point / LEARNER)


def nudge_weights(name: str) -> Spoil:
    def spoil(directory: Path) -> None:
        path = published(directory, CHECKPOINTS)[-1] / name
        weights = load_file(path)
        assert nudge(weights)
        save_file(weights, path)

    return spoil


def change_outcome(directory: Path) -> None:
    outcome = read_outcome(directory)
    assert outcome is not None
    publish_json(directory / OUTCOME, outcome.model_copy(update={"trained_tokens": outcome.trained_tokens + 1}))


def next_float(values: dict[str, float], name: str) -> None:
    values[name] = math.nextafter(values[name], math.inf)


SPOILT: list[tuple[str, Spoil]] = [
    (METRICS, edit_lines(METRICS, lambda lines: next_float(lines[2]["values"], "loss"))),
    (METRICS, edit_lines(METRICS, lambda lines: lines[-1].update(digest="0" * 64))),
    (METRICS, edit_lines(METRICS, lambda lines: lines[5]["values"].pop("kl_coefficient"))),
    (METRICS, edit_lines(METRICS, lambda lines: lines.insert(4, lines[4]))),
    (SAMPLES, edit_lines(SAMPLES, lambda lines: lines[7].update(completion=lines[7]["completion"] + "a"))),
    (SAMPLES, edit_lines(SAMPLES, lambda lines: lines.pop())),
    (EVENTS, edit_lines(EVENTS, lambda lines: next_float(lines[2]["data"], "reward_mean"))),
    (EVENTS, edit_lines(EVENTS, lambda lines: lines.append({**lines[0], "level": "warn", "data": {"code": "resume_not_exact"}}))),
    (OUTCOME, change_outcome),
    (CHECKPOINTS, nudge_weights("adapter_model.safetensors")),
    (CHECKPOINTS, nudge_weights("value.safetensors")),
    (CHECKPOINTS, lambda directory: (published(directory, CHECKPOINTS)[-1] / "tokenizer.json").unlink()),
    (CHECKPOINTS, lambda directory: shutil.rmtree(published(directory, CHECKPOINTS)[0])),
    (RESUME_POINTS, lambda directory: nudge_optimizer(published(directory, RESUME_POINTS)[-1])),
    (RESUME_POINTS, lambda directory: shutil.rmtree(published(directory, RESUME_POINTS)[0])),
]


@pytest.mark.parametrize(("place", "spoil"), SPOILT, ids=range(len(SPOILT)))
def test_one_wrong_thing_is_seen_and_named(tmp_path: Path, reference: Path, place: str, spoil: Spoil) -> None:
    spoilt = shutil.copytree(reference, tmp_path / "spoilt")
    assert differences(reference, [spoilt]) == []
    spoil(spoilt)
    found = differences(reference, [spoilt])
    assert found
    assert all(line.startswith(place) for line in found)


def test_another_process_and_its_clock_make_no_difference(tmp_path: Path, reference: Path) -> None:
    again = make_directory(tmp_path / "again", SETTING)
    train(again)
    assert (again / METRICS).read_bytes() != (reference / METRICS).read_bytes()
    assert differences(reference, [again]) == []


def seal(point: Path) -> None:
    """Makes the manifest of a resume point fit its files."""
    manifest = read_manifest(point)
    entries = [(entry.name, (point / entry.name).read_bytes()) for entry in manifest.files]
    files = [FileEntry(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()) for name, content in entries]
    publish_json(point / MANIFEST, manifest.model_copy(update={"files": files}))


def test_a_run_that_goes_on_from_a_wrong_optimizer_is_another_run(tmp_path: Path, reference: Path) -> None:
    right, wrong = (successor(reference, tmp_path / name) for name in ("right", "wrong"))
    nudge_optimizer(wrong / RESUME)
    seal(wrong / RESUME)
    train(right)
    train(wrong)
    assert differences(reference, [reference, right]) == []
    found = differences(reference, [reference, wrong])
    assert {line.split(" / ")[0] for line in found} >= {METRICS, CHECKPOINTS}
