"""Runs cases, one on each core. The uninterrupted runs go first: every case is compared with one of them."""

import os
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

from tests.resume.cases import SEED, Case, draw_random_kill
from tests.resume.comparison import differences, last_digest
from tests.resume.killed_trainer import Fault
from tests.resume.processes import (
    EndedTooEarly,
    RandomKill,
    Secrets,
    kill_at,
    kill_at_random,
    point_step,
    run_to_end,
    steps_done,
    successor,
)
from tests.resume.settings import STEPS, Setting, epoch_of, make_directory
from tests.trainer.runs import read_metrics

NUM_PROCESSES = min(8, len(os.sched_getaffinity(0)))
MAX_DRAWS = 5


@dataclass(frozen=True)
class Kill:
    """One that happened."""

    place: str
    step: int
    """The step that was being done, or made durable."""

    num_redone: int
    """Steps that were done before and had to be done again."""


@dataclass(frozen=True)
class Result:
    case: Case
    kills: list[Kill]
    digest: str
    differences: list[str]


class Bench:
    """`folder` keeps the uninterrupted runs and the cases that came out otherwise."""

    def __init__(self, folder: Path, cases: list[Case], settings: list[Setting]) -> None:
        """`settings`: those of the cases, and others whose uninterrupted run is wanted."""
        self._folder = folder
        self._inputs = {setting: make_directory(folder / f"{setting}-inputs", setting) for setting in settings}
        self._pool = ThreadPoolExecutor(NUM_PROCESSES)
        self._references = {setting: self._pool.submit(self._run_whole, setting) for setting in settings}
        self._results = {case: self._pool.submit(self._run, case) for case in cases}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def reference(self, setting: Setting) -> Path:
        """The directory of the uninterrupted run."""
        return self._references[setting].result()

    def result(self, case: Case) -> Result:
        return self._results[case].result()

    def results(self) -> list[Result]:
        """Of the cases that came to their end."""
        ended = [future for future in self._results.values() if future.done() and not future.cancelled()]
        return [future.result() for future in ended if future.exception() is None]

    def _run_whole(self, setting: Setting) -> Path:
        directory = self._copy(setting, self._folder / f"{setting}-uninterrupted")
        run_to_end(directory)
        return directory

    def _run(self, case: Case) -> Result:
        reference, folder = self.reference(case.setting), self._folder / str(case)
        draw = case.random()
        for _ in range(MAX_DRAWS):
            try:
                pieces, kills = kill_and_continue(case, self._copy(case.setting, folder / "1"), _planned(case, draw, reference))
            except EndedTooEarly:
                shutil.rmtree(folder)
                continue
            result = Result(case, kills, last_digest(pieces[-1]), differences(reference, pieces))
            if not result.differences:
                shutil.rmtree(folder)
            return result
        raise AssertionError(f"{case}: {MAX_DRAWS} runs in a row had ended before their random time came")

    def _copy(self, setting: Setting, folder: Path) -> Path:
        return Path(shutil.copytree(self._inputs[setting], folder))


def kill_and_continue(
    case: Case, directory: Path, planned: list[Fault | RandomKill], secrets: Secrets | None = None
) -> tuple[list[Path], list[Kill]]:
    """Starts in `directory`. -> all directories through which the run went, to its end, and its kills. Raises: EndedTooEarly."""
    pieces, kills = [directory], []
    for kill in planned:
        kills.append(_kill(kill, pieces[-1], secrets))
        if case.is_elsewhere:
            pieces.append(successor(pieces[-1], directory.with_name(str(len(pieces) + 1))))
    run_to_end(pieces[-1], secrets)
    return pieces, kills


def _planned(case: Case, draw: Random, reference: Path) -> list[Fault | RandomKill]:
    step_seconds = statistics.fmean(line.values["seconds_step"] for line in read_metrics(reference))
    return [*case.faults, *(draw_random_kill(draw, step_seconds, case.num_random) for _ in range(case.num_random))]


def _kill(planned: Fault | RandomKill, directory: Path, secrets: Secrets | None) -> Kill:
    if isinstance(planned, Fault):
        kill_at(planned, directory, secrets)
    else:
        kill_at_random(planned, directory)
    done = steps_done(directory)
    step = planned.step if isinstance(planned, Fault) and planned.step else min(done + 1, STEPS)
    return Kill(str(planned), step, done - point_step(directory))


def table(results: list[Result]) -> list[str]:
    """For people: a line for each case, and the sums."""
    rows = [("case", "goes on", "killed", "in step (epoch)", "steps redone", "last digest", "identical")]
    for result in results:
        kills = result.kills
        rows.append(
            (
                str(result.case),
                "elsewhere" if result.case.is_elsewhere else "in place",
                ", ".join(kill.place for kill in kills),
                ", ".join(f"{kill.step} ({epoch_of(kill.step)})" for kill in kills),
                ", ".join(str(kill.num_redone) for kill in kills),
                result.digest[:12],
                "no" if result.differences else "yes",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    num_kills = sum(len(result.kills) for result in results)
    num_identical = sum(not result.differences for result in results)
    return [*lines, "", f"{num_kills} SIGKILLs, {len(results)} continued runs, {num_identical} bit-identical; RESUME_SEED={SEED}"]
