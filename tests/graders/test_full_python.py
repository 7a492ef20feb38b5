"""Hostile and benign programs in both sandboxes, as root and as an ordinary user, and with each layer taken away. `-s` prints the table."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest

from graders.grade import Grade
from graders.python_sandbox import PythonGrader, SandboxLimits
from tests.graders.attacks import ATTACKS, BENIGN
from tests.graders.helpers import grade, request

ROOT = Path(__file__).parents[2]
ORDINARY = 65534
PYTHON = Path(sys.base_prefix).resolve()
KINDS: tuple[Literal["auto", "cpython"], ...] = ("auto", "cpython")
SUBSET = {name: BENIGN[name] for name in ("json", "re", "math", "collections", "exceptions", "prints")}
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

WITH_THE_INTERPRETER_IN_REACH = """
set -e
mount --make-rprivate /
held=$(mktemp -d)
mount --bind "$1" "$held"
mount -t tmpfs -o mode=755 none "$2"
mkdir -p "$1"
mount --bind "$held" "$1"
shift 2
exec "$@"
"""
"""In a mount namespace of its own: an interpreter that lies in a home that only root may enter, where anyone may enter it."""


class CannotBecome(Exception):
    pass


def as_user(uid: int, command: Sequence[str]) -> list[str]:
    """`command` as `uid`. Raises: CannotBecome."""
    if uid == os.geteuid():
        return list(command)
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        raise CannotBecome(f"user {os.geteuid()} cannot become user {uid}")
    changed = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]
    closed = next((folder for folder in reversed(PYTHON.parents) if not folder.stat().st_mode & 0o001), None)
    if closed is None:
        return changed
    return ["unshare", "--mount", "sh", "-c", WITH_THE_INTERPRETER_IN_REACH, "sh", str(PYTHON), str(closed), *changed]


def table(result: dict[str, Any]) -> str:
    lines = [f"user {result['uid']}", f"{'attack':45} {'auto':32} all of Python"]
    rows = {(row["name"], row["interpreter"]): row for row in result["attacks"]}
    for name in ATTACKS:
        shown = [f"{rows[name, kind]['verdict']}{' !' if rows[name, kind]['wrong'] else ''}" for kind in ("auto", "cpython")]
        lines.append(f"{name:45} {shown[0]:32} {shown[1]}")
    contained = [name for name in ATTACKS if not any(rows[name, kind]["wrong"] for kind in ("auto", "cpython"))]
    right = {row["name"] for row in result["benign"]} - {row["name"] for row in result["benign"] if row["wrong"]}
    return "\n".join([*lines, f"{len(contained)} of {len(ATTACKS)} attacks contained, {len(right)} of {len(BENIGN)} benign programs right"])


@pytest.fixture(scope="module")
def trials() -> Iterator[dict[int, "subprocess.Popen[str]"]]:
    """Both users at the same time: most of it is waiting."""
    started = {}
    for uid in (0, ORDINARY):
        with suppress(CannotBecome):
            command = as_user(uid, [sys.executable, "-m", "tests.graders.trial"])
            started[uid] = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
    yield started
    for process in started.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("uid", [0, ORDINARY])
def test_every_attack_is_contained_and_every_benign_program_works(uid: int, trials: dict[int, "subprocess.Popen[str]"]) -> None:
    if uid not in trials:
        pytest.skip(f"user {os.geteuid()} cannot become user {uid}")
    output, errors = trials[uid].communicate(timeout=300)
    assert trials[uid].returncode == 0, errors
    result = json.loads(output)
    print("\n" + table(result))
    assert result["uid"] == uid
    assert len(ATTACKS) >= 40
    assert len(BENIGN) >= 20
    assert [row for row in result["attacks"] + result["benign"] if row["wrong"]] == []
    assert result["left"] == []
    assert result["growth"] < 64 * 1024 * 1024


@pytest.mark.parametrize("uid", [0, ORDINARY])
def test_without_any_one_of_its_layers_the_sandbox_refuses_and_runs_nothing(uid: int) -> None:
    try:
        command = as_user(uid, [sys.executable, "-m", "tests.graders.layers"])
    except CannotBecome as error:
        pytest.skip(str(error))
    process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True)
    whole, *broken = json.loads(process.stdout)["cases"]
    assert [row["reward"] for row in whole["rows"]] == [None, 1.0, 1.0]
    assert not whole["ran"]
    for case in broken:
        if uid != 0 and case["layer"] in ("user", "privileges"):
            continue  # an ordinary user has no other one to become, and the test's own filter took his privileges
        assert [row["reward"] for row in case["rows"]] == [None] * 3, case
        in_full, in_auto = case["rows"][:2], case["rows"][2]
        assert [row["error"] for row in in_full] == ["python_grader_server_error"] * 2
        assert all(f"the program was not run: {case['layer']}" in row["message"] for row in in_full), case
        assert in_auto["error"] in ("python_grader_unsupported", "python_grader_server_error")  # the subset's own sandbox may fail as well
        assert not case["ran"]


def test_a_dead_sandbox_process_is_replaced_and_the_grade_asked_again() -> None:
    async def kill_between() -> list[Grade]:
        grader = PythonGrader("def grade(s, i):\n    return 1.0", interpreter="cpython")
        first = await grader.grade(request())
        for pid in sandbox_processes():
            os.kill(pid, signal.SIGKILL)
        second = await grader.grade(request())
        await grader.close()
        return [first, second]

    first, second = asyncio.run(kill_between())
    assert (first.reward, first.attempts, second.reward, second.attempts) == (1.0, 1, 1.0, 2)


def test_cancel_kills_the_running_program_at_once() -> None:
    async def cancel() -> float:
        limits = SandboxLimits(seconds=60.0, num_processes=1)
        grader = PythonGrader("def grade(s, i):\n    while True:\n        pass", limits, interpreter="cpython")
        task = asyncio.create_task(grader.grade(request()))
        while len(sandbox_processes()) < 2:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seconds = time.monotonic() - started
        await grader.close()
        return seconds

    assert asyncio.run(cancel()) < 2.0
    deadline = time.monotonic() + 3.0
    while sandbox_processes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sandbox_processes() == []


def test_nothing_is_left_when_the_trainer_is_killed() -> None:
    """As a worker kills it: the sandbox has a session of its own, which no signal to the trainer's reaches."""
    code = (
        "import asyncio\nfrom graders.python_sandbox import *\nfrom tests.graders.helpers import request\n"
        "source = 'import time\\ndef grade(s, i):\\n    time.sleep(100)\\n    return 1.0'\n"
        "asyncio.run(PythonGrader(source, SandboxLimits(seconds=100.0), interpreter='cpython').grade(request()))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT) as trainer:
        try:
            deadline = time.monotonic() + 60
            while len(left := sandbox_processes(trainer.pid)) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(left) == 2
        finally:
            trainer.kill()
    deadline = time.monotonic() + 5
    while any(map(is_alive, left)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, left))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_neither_environment_nor_command_line_of_the_sandbox_says_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_TEST_SECRET", "s3cret-env")

    async def look() -> list[tuple[bytes, bytes]]:
        grader = PythonGrader("def grade(s, i):\n    return 1.0", interpreter="cpython")
        await grader.grade(request())
        found = [(Path(f"/proc/{pid}/environ").read_bytes(), Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in sandbox_processes()]
        await grader.close()
        return found

    ((environment, command),) = asyncio.run(look())
    assert environment == b"PYTHONHASHSEED=0\0"
    assert b"s3cret" not in command
    assert b"def grade" not in command


def test_the_same_program_grades_the_same_in_both_sandboxes() -> None:
    for name, (source, reward) in SUBSET.items():
        grades = [grade(PythonGrader(source, interpreter=kind)) for kind in KINDS]
        assert [(each.reward, each.error) for each in grades] == [(reward, None)] * 2, name


def test_order_of_a_set_and_random_numbers_are_the_same_each_time() -> None:
    source = "import random\ndef grade(s, i):\n    return list({'a', 'b', 'c', 'd'}).index('a') + random.random()"
    rewards = {grade(PythonGrader(source, interpreter="cpython")).reward for _ in range(3)}
    assert len(rewards) == 1


def sandbox_processes(parent_pid: int = 0) -> list[int]:
    """Those of a process, by default ours, and those that they forked; not merely unreaped."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z" and b"sandbox_process" in (folder / "cmdline").read_bytes():
                parents[int(folder.name)] = int(parent)
        except OSError:
            continue
    ours = {pid for pid, parent in parents.items() if parent == (parent_pid or os.getpid())}
    return [pid for pid, parent in parents.items() if pid in ours or parent in ours]
