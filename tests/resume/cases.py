"""Which run is killed where: 40 at fault points, in five phases of each of the eight settings; 10 at random times; some that are meaner."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from random import Random

from core.run_directory import CHECKPOINTS, RESUME_POINTS
from tests.resume.killed_trainer import Fault
from tests.resume.processes import RandomKill
from tests.resume.settings import INTERVAL, SETTINGS, STEPS, Setting

SEED = int(os.environ.get("RESUME_SEED", "1"))
"""Draws the steps of the kills, where in a step they come, and the random times."""

NUM_RANDOM = 10


@dataclass(frozen=True)
class Case:
    setting: Setting
    phase: str
    faults: tuple[Fault, ...] = ()
    """Each kills one process, in this order. None of them: the times are random."""

    num_random: int = 0
    is_elsewhere: bool = False
    """Continued in a new directory, from what a worker hands over; else in the killed run's own."""

    def __str__(self) -> str:
        return f"{self.setting}-{self.phase.replace(' ', '_')}"

    def random(self) -> Random:
        return Random(f"{SEED}|{self}")


def in_rollout(index: int, draw: Random) -> Fault:
    return Fault("decode step", step=draw.randint(1, STEPS), nth=draw.randint(1, 4))


def in_grading(index: int, draw: Random) -> Fault:
    return Fault("half graded", step=draw.randint(1, STEPS))


def in_update(index: int, draw: Random) -> Fault:
    place = "backward" if _is_odd(index) else "optimizer step"
    return Fault(place, step=draw.randint(1, STEPS), nth=draw.randint(1, 4))


def in_write(index: int, draw: Random) -> Fault:
    folder = CHECKPOINTS if _is_odd(index) else RESUME_POINTS
    return Fault("half a file", step=_save_step(folder, draw), nth=draw.randint(1, 3) if folder == RESUME_POINTS else 1, folder=folder)


def before_publish(index: int, draw: Random) -> Fault:
    folder = CHECKPOINTS if _is_odd(index) else RESUME_POINTS
    place = "before manifest" if _is_odd(index // 2) else "before rename"
    return Fault(place, step=_save_step(folder, draw), folder=folder)


PHASES: dict[str, Callable[[int, Random], Fault]] = {
    "rollout": in_rollout,
    "grading": in_grading,
    "update": in_update,
    "checkpoint write": in_write,
    "before publish": before_publish,
}


def matrix() -> list[Case]:
    """The 40. Every third goes on elsewhere."""
    cases = []
    for index, setting in enumerate(SETTINGS):
        for phase, make_fault in PHASES.items():
            fault = make_fault(index, Random(f"{SEED}|{setting}|{phase}"))
            cases.append(Case(setting, phase, (fault,), is_elsewhere=len(cases) % 3 == 0))
    return cases


def random_times() -> list[Case]:
    """The last one is killed twice."""
    chosen = [SETTINGS[number % len(SETTINGS)] for number in range(NUM_RANDOM)]
    numbers = range(1, NUM_RANDOM + 1)
    return [
        Case(setting, f"random {number}", num_random=1 + (number == NUM_RANDOM), is_elsewhere=number % 2 == 0)
        for number, setting in zip(numbers, chosen, strict=True)
    ]


def meaner() -> list[Case]:
    """Kills between the five phases, and kills of a process that is just repairing what the first kill left."""
    grpo_lora, ppo_lora, ppo_full = Setting("grpo", "lora", 0), Setting("ppo", "lora", 1), Setting("ppo", "full", 0)
    whole_beside = Fault("before rename", step=4, folder=RESUME_POINTS)
    return [
        Case(grpo_lora, "replacement", (Fault("replacement", step=0, nth=2),)),
        Case(ppo_lora, "evaluation", (Fault("evaluation", step=4, nth=2),)),
        Case(ppo_full, "record", (Fault("half a line", step=5),)),
        Case(ppo_full, "replacing", (Fault("half graded", step=5), whole_beside)),
        Case(ppo_lora, "tidying", (whole_beside, Fault("removal", step=4, folder=RESUME_POINTS))),
    ]


def draw_random_kill(draw: Random, step_seconds: float, num_kills: int) -> RandomKill:
    """At any time of the step, or the one and a half, that follow one of the process's first steps: all `num_kills` fall into the run."""
    last = (STEPS - 2) // num_kills
    return RandomKill(draw.randint(1, last), draw.uniform(0.0, 1.5 * step_seconds))


def _save_step(folder: str, draw: Random) -> int:
    """A step that ends with such a folder; the last step has a checkpoint, but needs no resume point."""
    last = STEPS if folder == CHECKPOINTS else STEPS - INTERVAL
    return INTERVAL * draw.randint(1, last // INTERVAL)


def _is_odd(number: int) -> bool:
    """Whether the number of ones in binary is odd: so each choice falls on both values of every part of a setting."""
    return bool(number.bit_count() % 2)


ALL = list(chain(matrix(), random_times(), meaner()))
FEW = [case for case in matrix() if case.setting == Setting("ppo", "lora", 1) and case.phase in ("grading", "update", "before publish")]
"""For every `make test`."""
