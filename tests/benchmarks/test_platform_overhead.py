"""What is counted as the platform's cost. The processes that use it up are real: /proc knows no made-up ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu_seconds import Usage, read_tree, seconds_by_role, total_seconds
from benchmarks.platform_overhead import RECORDS, Round, beside_own_start, make_table, per_step, read_rounds
from benchmarks.platform_runs import OWN_START, ROLES, TRAINER, Reading, Used, used_between

CHILD = """
import time
while time.process_time() < 0.3: pass
print(flush=True)
input()
"""
PARENT = f"""
import resource, subprocess, sys, time
def used(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
while time.process_time() < 0.4: pass
child.stdout.readline()
print(used(resource.RUSAGE_SELF), flush=True)
input()
child.communicate(b"end")
print(used(resource.RUSAGE_SELF) + used(resource.RUSAGE_CHILDREN), flush=True)
input()
"""


def test_seconds_of_a_tree_are_those_that_its_processes_say_they_used_also_once_a_child_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        own = float(parent.stdout.readline())
        tree = read_tree(parent.pid)
        assert len(tree) == 2
        assert tree[parent.pid].own == pytest.approx(own, abs=0.03)
        assert all(usage.own >= 0.28 for usage in tree.values())
        assert all(usage.reaped == 0 for usage in tree.values())
        parent.stdin.write("\n")
        parent.stdin.flush()
        whole = float(parent.stdout.readline())
        after = read_tree(parent.pid)
        assert len(after) == 1
        assert total_seconds(after) == pytest.approx(whole, abs=0.03)
        assert total_seconds(after) >= total_seconds(tree)
        parent.stdin.write("\n")


def test_seconds_go_to_the_role_of_the_process_or_of_its_parent_and_ended_children_to_theirs() -> None:
    tree = {
        10: Usage(1, "python -m local.cli up ", 1.0, 0.5),
        11: Usage(10, "python -m celery -A worker.celery_app ", 2.0, 40.0),
        12: Usage(11, "python -m trainer /runs/1 ", 30.0, 0.25),
        13: Usage(12, "python -c sandbox ", 4.0, 0.0),
    }
    used = seconds_by_role(tree, {"up": "local.", "worker": "worker.celery_app", "trainer": "-m trainer "}, {"worker": "trainer"})
    assert used == {"up": 1.5, "worker": 2.0, "trainer": 40.0 + 30.25 + 4.0, "": 0.0}
    assert sum(used.values()) == total_seconds(tree)


def platform_cpu(trainer: float, worker: float) -> dict[str, float]:
    return {**dict.fromkeys(ROLES, 0.0), TRAINER: trainer, "worker": worker}


def use(*readings: dict[str, float], shares: dict[str, float] | None = None) -> Used:
    found = used_between([Reading(10.0 * number, cpu) for number, cpu in enumerate(readings)], "d")
    return found.model_copy(update={"shares": shares or {OWN_START: 9.0}, "idle": platform_cpu(0.0, 0.001)})


def test_the_start_each_step_and_the_end_are_what_lies_between_two_readings() -> None:
    used = use(*(platform_cpu(trainer, 0.0) for trainer in (5.0, 15.0, 17.0, 20.0, 24.0)))
    assert (used.start[TRAINER], [step[TRAINER] for step in used.steps], used.end[TRAINER]) == (10.0, [2.0, 3.0], 4.0)
    assert (used.step[TRAINER], used.seconds_step) == (2.5, 10.0)
    # Three steps: 10 with the first in it, 2.5 each for two more, 4 at the end.
    assert per_step(used, 3)[TRAINER] == pytest.approx((10.0 + 2 * 2.5 + 4.0) / 3)


def test_table_compares_step_by_step_and_says_what_is_beside_the_trainer() -> None:
    alone = use(*({TRAINER: seconds} for seconds in (0.0, 10.0, 20.0, 40.0, 44.0)))
    shares = {"validation": 0.25, OWN_START: 9.0, "relay": 0.75}
    platform = use(*(platform_cpu(seconds, seconds / 100) for seconds in (0.0, 10.0, 22.0, 42.0, 46.0)), shares=shares)
    assert beside_own_start(platform) == 1.0
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in make_table([entry(alone, platform)]).splitlines()
    }
    assert rows["CPU-seconds of a step while it trains, median"] == ["15.00", "16.16", "1.111 (1.010 to 1.212)", ""]
    assert rows["the same, mean"] == ["15.00", "16.16", "1.077", "+1.0 %"]
    assert rows["seconds to the first step: validation"] == ["", "0.25", "", "2.5 % of the way"]
    assert rows["seconds to the first step without the trainer's own start (wanted: 2)"] == ["", "1.00", "", ""]
    assert rows["CPU-seconds of a step: worker"] == ["", "0.160", "", "idle: 0.10 % of a core"]


def entry(alone: Used, platform: Used, commit: str = "abc", steps: int = 3) -> Round:
    return Round(commit=commit, steps=steps, alone=alone, platform=platform)


def test_only_rounds_of_the_same_commit_and_steps_are_put_together(tmp_path: Path) -> None:
    used = use(*({TRAINER: seconds} for seconds in (0.0, 1.0, 2.0, 3.0)))
    rounds = [entry(used, used), entry(used, used, commit="other"), entry(used, used, steps=4)]
    (tmp_path / RECORDS).write_text("".join(each.model_dump_json() + "\n" for each in rounds))
    assert read_rounds(tmp_path, "abc", 3) == [rounds[0]]
    assert read_rounds(tmp_path / "nowhere", "abc", 3) == []
