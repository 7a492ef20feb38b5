"""These tests start processes: what must hold is what the kernel says about them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.run_directory import publish_text
from tests.worker.jobs import wait_for
from worker.trainer_process import IDENTITY, identify, kill_left_over, start, trainer_environment

SLEEPER = "import time; time.sleep(60)"
FAMILY = (
    "import os, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); os._exit(child.pid and 0)"
)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def members(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_alive(int(entry.name)):
            fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            found += [int(entry.name)] if int(fields[2]) == group else []
    return found


def test_secrets_larger_than_a_pipe_arrive_whole(tmp_path: Path) -> None:
    secrets = {"grader_a@1": {"headers": {f"x-{number}": "s" * 1000 for number in range(300)}, "signing_secret": None}}
    code = "import json, sys; print(sum(map(len, json.load(open(int(sys.argv[3])))['secrets']['grader_a@1']['headers'].values())))"
    process = start([sys.executable, "-c", code], tmp_path, secrets, trainer_environment(1))
    wait_for(process.has_ended)
    assert process.reap(5) == 0
    assert (tmp_path / "trainer.log").read_text() == "300000\n"


def test_the_broker_is_told_by_the_pipe_alone(tmp_path: Path) -> None:
    limits = {"broker_url": "redis://:hush-hush@broker/0", "scope": "project", "owner": "job"}
    code = "import json, os, sys; print(json.load(open(int(sys.argv[3])))['limits'] == %r, 'hush' in str(os.environ) + str(sys.argv[1:]))"
    process = start([sys.executable, "-c", code % limits], tmp_path, {}, trainer_environment(1), limits)
    wait_for(process.has_ended)
    assert process.reap(5) == 0
    assert (tmp_path / "trainer.log").read_text() == "True False\n"


def test_child_that_never_reads_its_secrets_hinders_nobody(tmp_path: Path) -> None:
    process = start([sys.executable, "-c", "raise SystemExit(7)"], tmp_path, {"a": {"headers": {"x": "y" * 500_000}}}, {})
    wait_for(process.has_ended)
    assert process.reap(5) == 7


def test_end_of_the_trainer_is_the_end_of_everything_that_it_started(tmp_path: Path) -> None:
    process = start([sys.executable, "-c", FAMILY], tmp_path, {}, trainer_environment(1))
    wait_for(process.has_ended)
    assert len(members(process.pid)) == 1
    process.reap(5)
    wait_for(lambda: members(process.pid) == [])


@pytest.mark.parametrize("code", [SLEEPER, FAMILY], ids=["the trainer", "its children without it"])
def test_what_an_earlier_worker_left_running_is_killed(tmp_path: Path, code: str) -> None:
    left = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    publish_text(tmp_path / IDENTITY, json.dumps(identify(left.pid)))
    if code == FAMILY:
        left.wait()
    assert kill_left_over(tmp_path)
    left.wait()
    wait_for(lambda: members(left.pid) == [])
    assert not kill_left_over(tmp_path)


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"host": "elsewhere"}, {"boot": "before"}], ids=["reused pid", "host", "boot"])
def test_process_that_only_has_the_number_is_left_alone(tmp_path: Path, change: dict) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
    try:
        publish_text(tmp_path / IDENTITY, json.dumps(identify(stranger.pid)._replace(**change)))
        assert not kill_left_over(tmp_path)
        assert is_alive(stranger.pid)
    finally:
        os.kill(stranger.pid, signal.SIGKILL)
        stranger.wait()
