"""The digest that chains the steps: every bit of what it names changes it, and nothing else does."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.handmade import make_batch
from trainer.batch import Graded, Prompt, Rollout
from trainer.metrics import chained_digest

STEP: dict[str, Any] = {
    "previous": "a" * 64,
    "tokens": (5, 6, 1),
    "logprobs": (-0.5, -1.25, -2.0),
    "grade": 0.75,
    "reward": 0.5,
    "counts": True,
    "loss": 1e-9,
    "grad_norm": 3.0,
}


def digest(second: Graded | None = None, **changes: Any) -> str:
    """Of a step with two completions; `changes` are made to the first."""
    step = STEP | changes
    rollout = Rollout(Prompt(0, (1, 2), "", {}), 0, step["tokens"], step["logprobs"], "stop", "")
    other = second or Graded(replace(rollout, g=1, token_ids=(7,), logprobs=(-3.0,)), reward=0.25)
    batch = make_batch([step["reward"], 0.25], [[1, 1, 1], [1, 0, 0]], [0, 0], counts=[step["counts"], True])
    report = {"loss": step["loss"], "grad_norm": step["grad_norm"], "seconds_update": 1.0}
    return chained_digest(step["previous"], [Graded(rollout, reward=step["grade"]), other], batch, report)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous", "b" * 64),
        ("tokens", (5, 7, 1)),
        ("tokens", (6, 5, 1)),
        ("logprobs", (-0.5, math.nextafter(-1.25, 0), -2.0)),
        ("grade", math.nextafter(0.75, 1)),
        ("grade", None),
        ("reward", math.nextafter(0.5, 1)),
        ("counts", False),
        ("loss", math.nextafter(1e-9, 1)),
        ("grad_norm", math.nextafter(3.0, 4)),
    ],
)
def test_last_bit_of_everything_a_step_is_made_of_changes_its_digest(name: str, value: object) -> None:
    assert digest(**{name: value}) != digest()


def test_missing_grade_is_not_a_grade_of_zero() -> None:
    assert digest(grade=None) != digest(grade=0.0)


def test_what_differs_between_equal_runs_does_not_enter() -> None:
    """Attempts and latency of the grader, its words, and the texts."""
    plain = Graded(Rollout(Prompt(0, (1, 2), "", {}), 1, (7,), (-3.0,), "stop", ""), reward=0.25)
    told = replace(plain, rollout=replace(plain.rollout, text="x"), explanation="well", attempts=3, latency_seconds=9.0)
    assert digest(told) == digest(plain) == digest()
