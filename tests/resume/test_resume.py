"""SIGKILL at every place of a step, then another process goes on: the run must be the one that was never interrupted, bit for bit.

These tests spawn trainers, because only a process can be killed as processes are. `make test-resume` runs them all, about five
minutes on two cores; `make test` a few.
"""

import pytest

from tests.resume.bench import Bench
from tests.resume.cases import ALL, FEW, NUM_RANDOM, PHASES, Case, matrix
from tests.resume.killed_trainer import PLACES
from tests.resume.settings import SETTINGS, epoch_of


def check(bench: Bench, case: Case) -> None:
    result = bench.result(case)
    assert result.differences == [], "\n".join([f"{case}, {result.kills}:", *result.differences])


@pytest.mark.resume
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_killed_and_continued_run_is_bit_for_bit_the_uninterrupted_one(bench: Bench, case: Case) -> None:
    check(bench, case)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_few_killed_and_continued_runs_are_bit_for_bit_the_uninterrupted_one(bench: Bench, case: Case) -> None:
    check(bench, case)


def test_the_kills_are_those_that_were_promised() -> None:
    faults = [fault for case in ALL for fault in case.faults]
    assert {(case.setting, case.phase) for case in matrix()} == {(setting, phase) for setting in SETTINGS for phase in PHASES}
    assert sum(case.num_random > 0 for case in ALL) == NUM_RANDOM
    assert sum(case.num_random > 1 for case in ALL) == 1
    assert {fault.place for fault in faults} == PLACES.keys()
    assert any(epoch_of(fault.step) > 0 for fault in faults)
    assert {case.is_elsewhere for case in matrix()} == {True, False}
