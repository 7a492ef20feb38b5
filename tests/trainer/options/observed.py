"""A tiny run through the loop, with what each update was given: options are judged by what they did there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.run_directory import CHECKPOINTS, MODEL, RESUME_POINTS, Outcome, SampleLine
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, read_samples, train_here
from trainer.batch import Batch, Estimate
from trainer.update import Learner, Plan


@dataclass
class Observed:
    folder: Path
    outcome: Outcome
    metrics: list[dict[str, float]]
    samples: list[SampleLine]
    batches: list[Batch] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def first(self, name: str) -> float:
        return self.metrics[0][name]

    def last(self, name: str) -> float:
        return self.metrics[-1][name]

    def curve(self, name: str) -> list[float]:
        return [values[name] for values in self.metrics]

    def weights(self, file: str = "model.safetensors") -> dict[str, Tensor]:
        """Of the final checkpoint."""
        return load_file(self.folder / CHECKPOINTS / f"step_{self.outcome.step:06d}" / file)

    def base(self) -> dict[str, Tensor]:
        return load_file(self.folder / MODEL / "model.safetensors")

    def moved(self) -> float:
        """The largest change of a weight over the run."""
        after, before = self.weights(), self.base()
        return max(float((after[name] - before[name]).abs().max()) for name in before)

    def learner(self, step: int) -> dict[str, Any]:
        """State of the resume point of `step`, as saved."""
        path = self.folder / RESUME_POINTS / f"step_{step:06d}" / "learner.pt"
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return state

    def rewards_by_group(self, step: int = 1) -> dict[int, list[float]]:
        groups: dict[int, list[float]] = {}
        for sample in self.samples:
            if sample.step == step and sample.reward is not None:
                groups.setdefault(sample.prompt_index, []).append(sample.reward)
        return groups


def observe(folder: Path, grader: FunctionGrader | None = None, **options: Any) -> Observed:
    """One step on the tiny model unless `options` say more."""
    seen: dict[str, list[Any]] = {"batches": [], "estimates": [], "plans": []}
    update = Learner.update

    def noted(self: Learner, batch: Batch, estimate: Estimate, plan: Plan, step: int) -> dict[str, float]:
        for name, value in (("batches", batch), ("estimates", estimate), ("plans", plan)):
            seen[name].append(value)
        return update(self, batch, estimate, plan, step)

    make_run_directory(folder, **{"max_steps": 1, "model": {"hidden": 32, "head_scale": 12.0}, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", noted)
        outcome = train_here(folder, grader or FunctionGrader(graded_by_letters))
    return Observed(folder, outcome, [line.values for line in read_metrics(folder)], read_samples(folder), **seen)


def graded_by_letters(request: Any) -> float:
    """No two completions of a group are likely to have the same grade."""
    return letter_fraction(request) + 0.01 * sum(map(ord, request.output_text)) / 8


def constant(request: Any) -> float:
    return 1.0
