"""What a run remembers of its metrics: the first steps, the newest ones and the evaluations. Bounded, and exact through JSON."""

import math
from statistics import fmean, median
from typing import Self

from pydantic import BaseModel, ConfigDict

WINDOW = 10
"""Steps that a mean is taken over: one step of a few prompts says little, and a short run has ten."""

FIRST_STEPS = 3
"""What later steps are compared with. Few, because a policy may learn much in its first ten steps."""

EVALUATIONS = 20
"""By default a run has 11."""

REMEMBERED = (
    "reward_mean",
    "reward_std",
    "zero_variance_group_fraction",
    "entropy",
    "clip_fraction",
    "kl_reference",
    "explained_variance",
    "completion_tokens_mean",
    "truncated_fraction",
    "grader_failure_fraction",
    "grad_norm",
    "sampler_mismatch_kl",
)
"""The training metrics that the run doctor's rules read."""


class FrozenModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Observation(FrozenModel):
    """Metrics of one step."""

    step: int
    values: dict[str, float]


class History(FrozenModel):
    """All means are NaN, which makes every comparison false, where a step that belongs to them is missing or lacks the metric."""

    first: tuple[Observation, ...] = ()
    """The first FIRST_STEPS steps."""

    recent: tuple[Observation, ...] = ()
    """The newest two windows, oldest first."""

    evaluations: tuple[Observation, ...] = ()
    """`valid_reward_mean` and its half width, with the means of `reward_mean` and `reward_std` over the window that ends there."""

    def after(self, step: int, train: dict[str, float], valid: dict[str, float]) -> Self:
        """With the metrics of step `step` and of its evaluation, either of which may be empty."""
        first, recent, evaluations = self.first, self.recent, self.evaluations
        if train:
            seen = Observation(step=step, values={name: train[name] for name in REMEMBERED if name in train})
            first, recent = (*first, seen)[:FIRST_STEPS], (*recent, seen)[-2 * WINDOW :]
        rewards, deviations = (_values(recent[-WINDOW:], name) for name in ("reward_mean", "reward_std"))
        if "valid_reward_mean" in valid and rewards:
            values = {name: valid[name] for name in ("valid_reward_mean", "valid_reward_half_width")}
            values |= {"reward_mean": fmean(rewards), "reward_std": fmean(deviations)}
            evaluations = (*evaluations, Observation(step=step, values=values))[-EVALUATIONS:]
        return self.model_copy(update={"first": first, "recent": recent, "evaluations": evaluations})

    def mean(self, name: str) -> float:
        """Over the newest window."""
        return _mean(self.recent[-WINDOW:], name, WINDOW)

    def mean_before(self, name: str) -> float:
        """Over the window before the newest."""
        return _mean(self.recent[:-WINDOW], name, WINDOW)

    def median(self, name: str) -> float:
        """Over both windows; unlike a mean it bears single values that are far off."""
        values = _values(self.recent, name)
        return median(values) if len(values) == 2 * WINDOW else math.nan

    def first_mean(self, name: str) -> float:
        return _mean(self.first, name, FIRST_STEPS)

    def least(self, name: str) -> float:
        """The smallest of the newest window."""
        values = _values(self.recent[-WINDOW:], name)
        return min(values) if len(values) == WINDOW else math.nan

    def window_steps(self) -> dict[str, float]:
        """Where the newest window begins and ends."""
        window = self.recent[-WINDOW:]
        return {"first_step": window[0].step, "last_step": window[-1].step}


def _values(observations: tuple[Observation, ...], name: str) -> list[float]:
    return [seen.values[name] for seen in observations if name in seen.values]


def _mean(observations: tuple[Observation, ...], name: str, count: int) -> float:
    values = _values(observations, name)
    return fmean(values) if len(values) == count else math.nan
