"""SIGKILL at every place of a step, then another process goes on: the run must be the one that was never interrupted, bit for bit.

These tests spawn trainers, because only a process can be killed as processes are. `make test-resume` runs them all, about five
minutes on two cores; `make test` a few.
"""

import pytest

from tests.resume.bench import Bench
from tests.resume.cases import ALL, FEW, NUM_RANDOM, PHASES, Case, matrix
from tests.resume.killed_trainer import PLACES
from tests.resume.settings import SETTINGS, STEPS, Setting, epoch_of
from tests.trainer.runs import read_metrics


def check(bench: Bench, case: Case) -> None:
    result = bench.result(case)
    assert result.differences == [], "\n".join([f"{case}, {result.kills}:", *result.differences])


@pytest.mark.resume
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_killed_and_continued_run_is_bit_for_bit_the_uninterrupted_one(bench: Bench, case: Case) -> None:
    check(bench, case)


@pytest.mark.resume
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_uninterrupted_runs_have_what_is_hard_to_resume(bench: Bench, setting: Setting) -> None:
    """Else the comparison would prove little: ragged lengths, rollouts a step ahead, replaced groups, a coefficient that moves."""
    metrics = [line.values for line in read_metrics(bench.reference(setting))]
    assert len({values["completion_tokens_mean"] for values in metrics}) > STEPS // 2
    assert [values["weight_lag"] for values in metrics] == [0.0] + [float(setting.max_staleness)] * (STEPS - 1)
    assert any(values.get("dynamic_sampling_rounds") for values in metrics) == ("dynamic_sampling" in setting.options)
    assert (len({values["kl_coefficient"] for values in metrics}) > 1) == ("kl_target" in setting.options)


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
