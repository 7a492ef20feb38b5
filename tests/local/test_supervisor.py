"""These tests start processes: what must hold is what the kernel says about them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from local import processes
from local.parts import Part
from local.supervisor import Supervisor
from tests.local.trees import alive_with, wait_for


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(said: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(said.append)
    yield supervisor
    supervisor.stop(list(supervisor.running), lambda: True)


def part(folder: Path, name: str, code: str, stop_seconds: float = 5.0) -> Part:
    return Part(name, (sys.executable, "-c", code), os.environ, folder / f"{name}.log", stop_seconds)


def test_dead_process_is_started_again_and_each_time_later(supervisor: Supervisor, said: list[str], tmp_path: Path) -> None:
    supervisor.start(part(tmp_path, "broken", "raise SystemExit(3)"))
    entry = supervisor.running["broken"]
    delays = []
    for _ in range(3):
        assert wait_for(lambda: bool(supervisor.ended()), 5)
        before = time.monotonic()
        supervisor.tick()
        assert entry.restart_at is not None
        delays.append(round(entry.restart_at - before))
        entry.restart_at = before
        supervisor.tick()
        assert entry.restart_at is None
    assert delays == [1, 2, 4]
    assert "broken ended with code 3" in said[0]


def test_children_from_before_the_supervision_are_left_alone(said: list[str], tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    supervisor = Supervisor(said.append)
    supervisor.start(part(tmp_path, "broken", "raise SystemExit(3)"))
    try:
        assert wait_for(lambda: bool(supervisor.ended()), 5)
        supervisor.tick()
        assert other.poll() is None
    finally:
        supervisor.stop(list(supervisor.running), lambda: True)
        other.kill()
        other.wait()


def test_process_that_lived_long_waits_no_longer_than_after_its_first_death(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(part(tmp_path, "old", "raise SystemExit(1)"))
    entry = supervisor.running["old"]
    entry.deaths, entry.started_at = 5, time.monotonic() - 3600
    assert wait_for(lambda: bool(supervisor.ended()), 5)
    supervisor.tick()
    assert entry.deaths == 1


def test_process_that_ignores_sigterm_is_killed_after_its_time(supervisor: Supervisor, said: list[str], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal,time,pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    supervisor.start(part(tmp_path, "deaf", code, stop_seconds=0.3))
    pid = supervisor.running["deaf"].process.pid
    assert wait_for(ready.exists, 5)
    supervisor.stop(["deaf"], lambda: False)
    assert processes.read_process(pid) is None
    assert any("did not end within" in line for line in said)


TREE = """
import os, sys, time
from pathlib import Path
from local import processes
from local.parts import Part
from local.supervisor import Supervisor

ESCAPE = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', SLEEP, MARK], start_new_session=True); "
processes.adopt_orphans()
supervisor = Supervisor(print)
code = ESCAPE.replace("MARK", repr({mark!r})).replace("SLEEP", repr("import time; time.sleep(99)")) + {then!r}
supervisor.start(Part("parent", (sys.executable, "-c", code, {mark!r}), os.environ, Path({folder!r}) / "log", 1))
{rest}
"""
WATCH = """
while True:
    supervisor.tick()
    supervisor.running["parent"].restart_at = supervisor.running["parent"].restart_at and 9e9
    time.sleep(0.05)
"""


def start_tree(folder: Path, mark: str, then: str, rest: str) -> subprocess.Popen[bytes]:
    """A supervisor with one child that has a child in a session of its own; then the child does `then`, the supervisor `rest`."""
    code = TREE.format(folder=str(folder), mark=mark, then=then, rest=rest)
    return subprocess.Popen([sys.executable, "-c", code, mark], env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_descendants_in_sessions_of_their_own_are_killed_too(tmp_path: Path) -> None:
    mark = f"tree-{os.getpid()}-{tmp_path.name}"
    tree = start_tree(tmp_path, mark, "time.sleep(99)", "time.sleep(1.0); sys.exit(not processes.kill_descendants())")
    assert wait_for(lambda: len(alive_with(mark)) == 3, 5)
    assert tree.wait(timeout=15) == 0
    assert alive_with(mark) == []


def test_children_of_a_dead_child_do_not_live_on(tmp_path: Path) -> None:
    mark = f"orphan-{os.getpid()}-{tmp_path.name}"
    tree = start_tree(tmp_path, mark, "time.sleep(0.5); raise SystemExit(1)", WATCH)
    try:
        assert wait_for(lambda: len(alive_with(mark)) == 3, 5)
        assert wait_for(lambda: alive_with(mark) == [tree.pid], 5)
    finally:
        tree.kill()
        tree.wait()


def test_child_dies_with_the_supervisor_that_is_killed(tmp_path: Path) -> None:
    mark = f"pdeath-{os.getpid()}-{tmp_path.name}"
    code = f"import time; time.sleep(99)  # {mark}"
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom local.parts import Part\nfrom local.supervisor import spawn\n"
        f"spawn(Part('child', (sys.executable, '-c', {code!r}), os.environ, Path({str(tmp_path)!r}) / 'log', 1))\ntime.sleep(99)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert wait_for(lambda: len(alive_with(mark)) == 2, 5)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: alive_with(mark) == [], 5)
