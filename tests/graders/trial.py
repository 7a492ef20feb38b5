"""Every attack and every benign program in the sandbox, by whichever user starts this: `python -m tests.graders.trial`. Prints JSON.

What counts as contained: a typed failure or a harmless number, in time, with no file, connection, process or memory of ours touched.
"""

import asyncio
import ctypes
import hashlib
import json
import os
import resource
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graders.grade import Grade, GradeFailure, GradeRequest
from graders.python_sandbox import PythonGrader, SandboxLimits
from tests.graders.attacks import ATTACKS, BENIGN, ESCAPED

SECRET = "s3cret-in-the-environment"
LIMITS = SandboxLimits(seconds=0.4, memory_bytes=64 * 1024 * 1024, num_processes=1)
PATIENT = SandboxLimits(seconds=20.0, memory_bytes=64 * 1024 * 1024, num_processes=1)
MAX_SECONDS = 10.0
MAX_GROWTH_BYTES = 64 * 1024 * 1024
PR_SET_CHILD_SUBREAPER = 36
FAILURES = set(GradeFailure)


@dataclass
class Canaries:
    """What an attack would touch."""

    folder: Path
    listeners: list[socket.socket]

    @property
    def item(self) -> dict[str, Any]:
        tcp, udp, abstract, path = (listener.getsockname() for listener in self.listeners)
        targets = {"port": tcp[1], "udp": udp[1], "abstract": abstract[1:].decode(), "socket": path}
        return {**targets, "folder": str(self.folder), "file": str(self.folder / "canary"), "pid": os.getpid(), "answer": "4"}

    def state(self) -> str:
        facts = [(path.name, path.stat().st_mode, path.stat().st_mtime_ns) for path in sorted(self.folder.rglob("*"))]
        return hashlib.sha256(repr((facts, (self.folder / "canary").read_bytes())).encode()).hexdigest()

    def visitors(self) -> int:
        return sum(map(_is_visited, self.listeners))


def open_canaries(folder: Path) -> Canaries:
    folder.chmod(0o777)
    for name in ("canary", "canary_module.py"):
        (folder / name).write_text("x = 1\n")
        (folder / name).chmod(0o666)
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    abstract, path = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0hone-canary-{os.getpid()}")
    path.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    for listener in (abstract, path):
        listener.listen()
    listeners = [tcp, udp, abstract, path]
    for listener in listeners:
        listener.setblocking(False)
    return Canaries(folder, listeners)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["HONE_TEST_SECRET"] = SECRET
    with tempfile.TemporaryDirectory() as folder:
        canaries = open_canaries(Path(folder))
        asyncio.run(grade_benign(canaries, "cpython"))  # a first run brings the memory to its level
        before = resident_bytes()
        rows = [row for interpreter in ("auto", "cpython") for row in asyncio.run(attack(canaries, interpreter))]
        benign = [row for interpreter in ("auto", "cpython") for row in asyncio.run(grade_benign(canaries, interpreter))]
        growth = resident_bytes() - before
    json.dump({"uid": os.getuid(), "attacks": rows, "benign": benign, "growth": growth, "left": left_over()}, sys.stdout)


async def attack(canaries: Canaries, interpreter: Any) -> list[dict[str, Any]]:
    return [await _attack(canaries, interpreter, name, source) for name, source in ATTACKS.items()]


async def _attack(canaries: Canaries, interpreter: Any, name: str, source: str) -> dict[str, Any]:
    state = canaries.state()
    grader = PythonGrader(source, LIMITS, interpreter=interpreter)
    started = time.monotonic()
    result = await grader.grade(GradeRequest(item=canaries.item, output_text="4"))
    seconds = time.monotonic() - started
    await grader.close()
    wrong = {
        "escaped": result.reward == ESCAPED,
        "verdict": not _is_typed(result),
        "secret": SECRET in repr(result),
        "files": canaries.state() != state,
        "connections": canaries.visitors() > 0,
        "time": seconds > MAX_SECONDS,
        "processes": bool(left_over()),
    }
    found = [what for what, is_so in wrong.items() if is_so]
    return {"name": name, "interpreter": interpreter, "verdict": result.error or result.reward, "seconds": seconds, "wrong": found}


def _is_typed(result: Grade) -> bool:
    return result.reward is None if result.error in FAILURES else type(result.reward) is float and abs(result.reward) < float("inf")


async def grade_benign(canaries: Canaries, interpreter: Any) -> list[dict[str, Any]]:
    rows = []
    for name, (source, reward) in BENIGN.items():
        grader = PythonGrader(source, PATIENT, interpreter=interpreter)
        result = await grader.grade(GradeRequest(item=canaries.item, output_text="4"))
        await grader.close()
        wrong = [] if result.reward == reward else [f"{result.reward} {result.error_message}"]
        rows.append({"name": name, "interpreter": interpreter, "verdict": result.error or result.reward, "wrong": wrong})
    return rows


def left_over(seconds: float = 5.0) -> list[int]:
    """The processes that are still there after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def children() -> list[int]:
    """Processes whose parent we are, whoever started them: orphans come to us."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(folder.name))
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _is_visited(listener: socket.socket) -> bool:
    try:
        if listener.type == socket.SOCK_DGRAM:
            listener.recv(10)
        else:
            listener.accept()
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main()
