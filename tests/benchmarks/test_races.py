"""The parts of the races that need no peer: what is timed is what was wanted, and the tables say what was measured."""

import os
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import update_speed
from benchmarks.contender import Contender, ContenderFailed, Report
from benchmarks.gradient_check import ContendersDiffer, relative_difference
from benchmarks.library import ForcedLengths, LibraryRollout
from benchmarks.ours import make_job, run_ours
from benchmarks.phases import PHASES, PhaseClock
from benchmarks.plain_update import PlainUpdate
from benchmarks.race import choose, run_rounds
from benchmarks.race_table import Entry, Goal, Race, Record, make_goals, make_table
from benchmarks.rollout_speed import roll_ours
from benchmarks.workload import GROUP_SIZE, NUM_PROMPTS, Workload, completion_lengths, draw_lengths, prompt_rows, reward
from tests.benchmarks.contenders import count_steps, fail
from tests.tiny import build_tiny_model
from trainer.advantages import make_estimator
from trainer.policy import Policy
from trainer.update import Learner

SHORT = (1, 2, 3, 5, 8, 8, 2, 1) * NUM_PROMPTS


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    model = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny", hidden=32)
    return Workload(model, SHORT, "full", "float32", num_threads=1)


def test_drawn_lengths_are_the_same_in_every_process() -> None:
    drawn = completion_lengths("drawn")
    assert len(drawn) == NUM_PROMPTS * GROUP_SIZE
    assert drawn == draw_lengths(32, 37)
    assert drawn != draw_lengths(32, 38)
    assert (drawn[:4], max(drawn)) == ((46, 4, 38, 73), 128)
    assert 37 <= statistics.fmean(drawn) <= 39


def test_drawn_lengths_are_geometric_before_the_cut() -> None:
    """A token is the last with probability 1/40, whatever came before it."""
    drawn = draw_lengths(20_000, seed=1)
    survivors = [sum(length > n for length in drawn) for n in (0, 20, 40, 100)]
    for n, count in zip((0, 20, 40, 100), survivors, strict=True):
        assert count / len(drawn) == pytest.approx((1 - 1 / 40) ** n, abs=0.015)
    assert min(drawn) == 1
    assert max(drawn) == 128


def test_every_group_has_different_rewards() -> None:
    rewards = [reward(f"text {n}") for n in range(8)]
    assert len(set(rewards)) == 8
    assert all(0 <= value < 1 for value in rewards)


def report(step: float, peak: float = 1.0, **phases: float) -> Report:
    return Report({**dict.fromkeys(PHASES, 0.0), **phases, "step": step}, tokens=2048, peak_bytes=int(peak * 2**30))


OURS = Entry("ours", [report(2.0, 3.0, forward=0.5), report(9.0, 5.0, forward=0.7), report(4.0, 4.0, forward=0.9)])
PEER = Entry("TRL, micro-batch 8", [report(10.0, 2.0, forward=3.0), report(12.0, 4.0, forward=2.0), report(50.0, 3.0, forward=4.0)])


def test_ratios_are_of_medians_and_memory_is_the_highest_peak() -> None:
    race = Race("fixed-full-bf16", OURS, PEER)
    assert race.speed_ratio == 12.0 / 4.0
    assert race.memory_ratio == 5.0 / 4.0
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in make_table([race]).splitlines()]
    ours, peer = (dict(zip(table[0], row, strict=True)) for row in table[2:])
    assert (ours["contender"], ours["forward s"], ours["whole s"], ours["min-max"]) == ("ours", "0.70", "4.00", "2.00-9.00")
    assert (ours["tokens/s"], ours["peak GiB"], ours["peer / ours"]) == ("512", "5.00", "**3.00**")
    assert (peer["contender"], peer["forward s"], peer["whole s"], peer["peak GiB"]) == ("TRL, micro-batch 8", "3.00", "12.00", "4.00")


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal("speed", "a", 3.0), "yes"),
        (Goal("speed", "a", 3.1), "no"),
        (Goal("memory", "a", 1.25, is_memory=True), "yes"),
        (Goal("memory", "a", 1.2, is_memory=True), "no"),
    ],
)
def test_a_goal_is_reached_by_more_speed_or_by_less_memory(goal: Goal, reached: str) -> None:
    lines = make_goals([Race("a", OURS, PEER)], [goal, Goal("of a race that was not run", "b", 1.0)]).splitlines()
    assert len(lines) == 3
    assert lines[-1].split("|")[-2].strip() == reached


def test_races_are_kept_by_configuration_and_only_for_their_commit(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", "one")
    assert record.races() == []
    first, other, again = Race("a", OURS, PEER), Race("b", PEER, OURS), Race("a", PEER, PEER)
    for race in (first, other, again):
        record.add(race)
    assert record.races() == [again, other]
    assert Record(tmp_path / "record.json", "two").races() == []


def test_a_config_is_chosen_by_its_beginning() -> None:
    names = ["fixed-full-bf16", "fixed-lora-bf16", "drawn-full-bf16"]
    assert choose(names, ["fixed"]) == names[:2]
    assert choose(names, []) == []
    with pytest.raises(SystemExit, match="fixd"):
        choose(names, ["fixed", "fixd"])


def test_contenders_step_in_turn_in_processes_of_their_own(tmp_path: Path) -> None:
    """Spawns processes: that is what a contender is."""
    with Contender("one", tmp_path / "log", count_steps, 10) as one, Contender("two", tmp_path / "log", count_steps, 20) as two:
        race = run_rounds("a", one, two, rounds=2)
        pids = {contender.facts["pid"] for contender in (one, two)}
        assert len(pids | {os.getpid()}) == 3
    assert [entry.seconds["forward"] for entry in race.ours.reports] == [10.0, 11.0]
    assert [entry.tokens for entry in race.peer.reports] == [20, 21]
    assert all(entry.peak_bytes > 0 and entry.seconds["step"] >= 0 for entry in race.ours.reports)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_an_idle_contender_uses_no_processor_time_and_its_wait_is_not_timed(tmp_path: Path) -> None:
    with Contender("one", tmp_path / "log", count_steps, 0) as one:
        one.step()
        before = cpu_ticks(one.facts["pid"])
        time.sleep(0.5)
        assert cpu_ticks(one.facts["pid"]) - before <= 1
        assert one.step().seconds["step"] < 0.5


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_contender_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ContenderFailed, match="ValueError: no model here"):
        Contender("one", tmp_path / "log", fail)


def test_a_contender_that_is_killed_is_reported(tmp_path: Path) -> None:
    with Contender("one", tmp_path / "log", count_steps, 0) as one:
        os.kill(one.facts["pid"], signal.SIGKILL)
        with pytest.raises(ContenderFailed, match="one"):
            one.step()


def test_our_steps_are_whole_training_steps_with_phases_within_them(tmp_path: Path, workload: Workload) -> None:
    with Contender("ours", tmp_path / "log", run_ours, workload) as ours:
        assert set(ours.facts) == {"fp32_precision", "float32_matmul"}
        reports = [ours.step() for _ in range(3)]
    for one in reports:
        assert one.tokens == sum(SHORT)
        assert all(one.seconds[phase] >= 0 for phase in PHASES)
        assert sum(one.seconds[phase] for phase in PHASES) <= one.seconds["step"]


def test_our_completions_have_the_forced_lengths(tmp_path: Path, workload: Workload) -> None:
    """The contender counts the tokens that were sampled, not those that were asked for."""
    with Contender("ours", tmp_path / "log", roll_ours, workload) as ours:
        assert [ours.step().tokens for _ in range(2)] == [sum(SHORT)] * 2


def test_completions_of_the_library_end_at_the_forced_lengths_alone(workload: Workload) -> None:
    rollout = LibraryRollout(workload)
    end = 1  # of the tiny tokenizer
    for _ in range(2):
        tokens = rollout.generate()
        completions = tokens[:, tokens.shape[1] - max(SHORT) :].tolist()
        assert [row.index(end) + 1 for row in completions] == list(SHORT)


def test_forced_lengths_leave_other_logits_alone() -> None:
    force = ForcedLengths((1, 3), [2])
    scores = torch.arange(8.0).reshape(2, 4)
    first = force(torch.zeros(2, 1, dtype=torch.int64), scores.clone())
    assert first.tolist() == [[-torch.inf, -torch.inf, 0.0, -torch.inf], [4.0, 5.0, -torch.inf, 7.0]]
    second = force(torch.zeros(2, 2, dtype=torch.int64), scores.clone())
    assert second.tolist() == [[0.0, 1.0, -torch.inf, 3.0], [4.0, 5.0, -torch.inf, 7.0]]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_plain_update_has_the_gradient_of_ours(workload: Workload, kind: Any) -> None:
    """With adapters at B = 0 only the gradient of B is there, and B's does depend on A: A is taken over."""
    work = update_speed.Work(replace(workload, finetuning=kind), 6, "cpu", "tiny")
    job = make_job(work.workload)
    policy = Policy(work.make_model(), job.options, 1, torch.device("cpu"), workload.model)
    learner = Learner(policy, job.options, 1, 10, lambda: None)
    batch = update_speed.make_batch(work, 256, job.options)
    estimate = make_estimator(job.options)(batch, 0.0)
    learner.accumulate(batch, estimate, learner.plan(batch, 1)[0])
    names = [name.removeprefix("policy.") for name in policy.trainable_state()]
    ours = dict(zip(names, (parameter.grad for parameter in policy.policy_parameters()), strict=True))

    plain = PlainUpdate(work.make_model(), work.workload, PhaseClock())
    theirs = {name: parameter for name, parameter in plain.model.named_parameters() if parameter.requires_grad}
    for name, value in policy.trainable_state().items():
        theirs[name.removeprefix("policy.")].data.copy_(value)
    plain.accumulate(batch, estimate.advantages)
    gradients = {name: parameter.grad for name, parameter in theirs.items()}
    assert relative_difference(*({n: g for n, g in side.items() if g is not None} for side in (ours, gradients))) < 1e-5


def test_gradients_of_other_parameters_or_values_differ() -> None:
    ours = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert relative_difference(ours, {"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}) == pytest.approx(0.1)
    with pytest.raises(ContendersDiffer, match="c"):
        relative_difference(ours, {"a": torch.tensor([3.0]), "c": torch.tensor([4.0])})


def test_all_prompts_of_a_step_are_different() -> None:
    assert len({row["messages"][-1]["content"] for row in prompt_rows()}) == NUM_PROMPTS
