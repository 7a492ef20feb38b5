"""The graded rollouts of one step: sampled by the current weights, a step ahead where `max_staleness` is 1, silent groups replaced."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from core.options import Options
from trainer.batch import Graded, Prompt, Rollout, Support
from trainer.control import ControlReader
from trainer.data import PromptOrder, overlong_penalty
from trainer.grading import GradingRound, GradingService
from trainer.metrics import Stopwatch
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, Sampling


@dataclass
class Pending:
    """The rollouts of `step` on their way through the grader."""

    step: int
    rollouts: list[Rollout]
    verdicts: GradingRound
    weight_lag: int = 0
    """Updates between the weights that sampled them and those that `step` updates."""

    old_logprobs: Tensor | None = None
    """[B, T], scored with the weights that sampled them; None where that is still to be done, with those very weights."""


@dataclass(frozen=True)
class Collected:
    """What a step trains on, and what it was chosen from."""

    graded: list[Graded]
    """Q groups of G, in the order of prompt, then g."""

    replaced: list[Graded] = field(default_factory=list)
    """Groups without signal that others took the place of, and others without signal that were tried."""

    num_rounds: int = 0
    """Extra rounds of sampling."""

    @property
    def all(self) -> list[Graded]:
        return [*self.graded, *self.replaced]


class Collector:
    """Samples and grades. Every choice of prompts is a function of (seed, step, round) and of grades."""

    def __init__(
        self,
        prompts: list[Prompt],
        order: PromptOrder,
        engine: RolloutEngine,
        grading: GradingService,
        options: Options,
        sampling: Callable[[Purpose, int, int], Sampling],
        control: ControlReader,
        clock: Stopwatch,
    ) -> None:
        """`sampling` makes the coordinates of (purpose, step, round)."""
        self.prompts, self._order, self._engine, self._grading = prompts, order, engine, grading
        self._options, self._sampling, self._control, self._clock = options, sampling, control, clock

    def generate(self, step: int) -> Pending:
        """Samples the completions of step `step` from the current weights; graders begin with the first that is finished."""
        return self._sample([self.prompts[row] for row in self._order.rows(step)], step, round_=0)

    def grade(self, pending: Pending) -> Collected:
        """Waits for the verdicts; with `dynamic_sampling`, groups without signal give way to those of other prompts.

        What is still without signal after the last round stays. Raises: StopRequested, GraderUnavailable.
        Source: Yu et al. 2025 (DAPO), arXiv:2503.14476 equation 11.
        """
        groups, replaced, rounds = self._groups(self._wait(pending)), [], 0
        tried = {group[0].rollout.prompt.index for group in groups}
        while rounds < self._options.dynamic_sampling and (silent := self._silent(groups)):
            rows = self._order.other_rows(pending.step, rounds + 1, tried)[: len(silent)]
            if not rows:
                break
            rounds += 1
            tried |= set(rows)
            found = self._groups(self._wait(self._sample([self.prompts[row] for row in rows], pending.step, rounds)))
            useful = [group for group in found if self._has_signal(group)]
            replaced += [group for group in found if not self._has_signal(group)]
            for place, group in zip(silent, useful, strict=False):
                replaced.append(groups[place])
                groups[place] = group
        flat = [entry for group in groups for entry in group]
        return Collected(flat, [entry for group in replaced for entry in group], rounds)

    def submit(self, step: int, rollouts: list[Rollout]) -> GradingRound:
        """Asks for the verdicts of rollouts that were sampled before a resume."""
        verdicts = self._grading.open("rollout", step)
        for rollout in rollouts:
            verdicts.add(rollout)
        return verdicts

    def _sample(self, prompts: list[Prompt], step: int, round_: int) -> Pending:
        group_size, sampling = self._options.group_size, self._sampling(Purpose.ROLLOUT, step, round_)
        assert group_size is not None, "the options of a job are effective ones"
        with self._clock.time("rollout"), self._grading.open("rollout", step, round_) as verdicts:
            rollouts = self._engine.generate(prompts, group_size, sampling, on_finished=verdicts.add, check=self._control.check)
        return Pending(step, rollouts, verdicts)

    def _wait(self, pending: Pending) -> list[Graded]:
        with self._clock.time("grading"), pending.verdicts:
            return pending.verdicts.collect(pending.rollouts, self._control.check_waiting)

    def _groups(self, graded: list[Graded]) -> list[list[Graded]]:
        size = self._options.group_size or 1
        return [graded[start : start + size] for start in range(0, len(graded), size)]

    def _silent(self, groups: list[list[Graded]]) -> list[int]:
        return [place for place, group in enumerate(groups) if not self._has_signal(group)]

    def _has_signal(self, group: list[Graded]) -> bool:
        """Whether two of the completions that count have different grades."""
        masked = self._options.mask_truncated
        grades = {entry.reward for entry in group if not (masked and entry.rollout.finish_reason == "length")} - {None}
        return len(grades) > 1


def collection_metrics(collected: Collected, options: Options) -> dict[str, float]:
    """What was done to rollouts and rewards before they became a batch; empty where the options ask for nothing."""
    found: dict[str, float] = {}
    if options.dynamic_sampling:
        found["dynamic_sampling_rounds"] = float(collected.num_rounds)
        found["replaced_group_fraction"] = len(collected.replaced) / len(collected.all)
    if options.overlong_penalty:
        graded = [entry for entry in collected.graded if entry.reward is not None]
        penalties = [overlong_penalty(len(entry.rollout.token_ids), options) for entry in graded]
        found["overlong_penalty_mean"] = statistics.fmean(penalties) if penalties else 0.0
    return found


def to_plain(pending: Pending) -> dict[str, Any]:
    """`pending` without its verdicts, in types that `torch.load(weights_only=True)` reads."""
    return {
        "step": pending.step,
        "weight_lag": pending.weight_lag,
        "old_logprobs": pending.old_logprobs,
        "rollouts": [
            {
                "prompt": rollout.prompt.index,
                "g": rollout.g,
                "token_ids": list(rollout.token_ids),
                "logprobs": list(rollout.logprobs),
                "finish_reason": rollout.finish_reason,
                "text": rollout.text,
                "support": None if rollout.support is None else (rollout.support.offsets, rollout.support.token_ids),
            }
            for rollout in pending.rollouts
        ],
    }


def from_plain(plain: dict[str, Any], collector: Collector) -> Pending:
    """The same rollouts, asked for again: what was answered stands in the journal."""
    rollouts = [
        Rollout(
            prompt=collector.prompts[entry["prompt"]],
            g=entry["g"],
            token_ids=tuple(entry["token_ids"]),
            logprobs=tuple(entry["logprobs"]),
            finish_reason=entry["finish_reason"],
            text=entry["text"],
            support=None if entry["support"] is None else Support(*entry["support"]),
        )
        for entry in plain["rollouts"]
    ]
    verdicts = collector.submit(plain["step"], rollouts)
    return Pending(plain["step"], rollouts, verdicts, plain["weight_lag"], plain["old_logprobs"])
