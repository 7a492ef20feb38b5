"""One grade in the full sandbox for each of its layers while the kernel does not give it: `python -m tests.graders.layers`. Prints JSON.

A filter of system calls of our own makes the kernel refuse, or pretend to have done, what the layer needs; our children inherit it.
"""

import asyncio
import ctypes
import errno
import json
import os
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graders.grade import GradeRequest
from graders.python_sandbox import PythonGrader, SandboxLimits

NUMBERS = {
    "x86_64": {"prctl": 157, "setresuid": 117, "prlimit64": 302, "setrlimit": 160, "seccomp": 317},
    "aarch64": {"prctl": 167, "setresuid": 147, "prlimit64": 261, "setrlimit": 164, "seccomp": 277},
}[os.uname().machine] | {"landlock_create_ruleset": 444, "landlock_restrict_self": 446}
PR_SET_NO_NEW_PRIVS = 38
LIMITS = SandboxLimits(seconds=20.0, num_processes=1)
PROGRAM = "import os\nfd = os.open({path!r}, os.O_WRONLY | os.O_CREAT)\ndef grade(sample, item):\n    return 1.0"
HARMLESS = "import statistics\ndef grade(sample, item):\n    return statistics.mean([1, 1])"


@dataclass(frozen=True)
class Case:
    layer: str
    calls: tuple[str, ...]
    answer: int
    """An errno; 0 is success, without the effect."""

    first_argument: int | None = None


CASES = [
    Case("none", (), 0),
    Case("limits", ("prlimit64", "setrlimit"), errno.EPERM),
    Case("limits", ("prlimit64", "setrlimit"), 0),
    Case("user", ("setresuid",), errno.EPERM),
    Case("user", ("setresuid",), 0),
    Case("privileges", ("prctl",), errno.EINVAL, PR_SET_NO_NEW_PRIVS),
    Case("privileges", ("prctl",), 0, PR_SET_NO_NEW_PRIVS),
    Case("landlock", ("landlock_create_ruleset",), errno.ENOSYS),
    Case("landlock", ("landlock_restrict_self",), errno.EPERM),
    Case("landlock", ("landlock_restrict_self",), 0),
    Case("seccomp", ("seccomp",), errno.ENOSYS),
    Case("seccomp", ("seccomp",), 0),
]


def take_away(case: Case) -> None:
    """For this process and all that it starts."""
    load, equal, answer, allow, error = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
    steps = []
    for number in (NUMBERS[name] for name in case.calls if name in NUMBERS):
        steps += [(load, 0, 0, 0), (equal, 0, 3, number)]
        steps += [(load, 0, 0, 16), (equal, 0, 1, case.first_argument)] if case.first_argument is not None else [(load, 0, 0, 0)] * 2
        steps += [(answer, 0, 0, error | case.answer)]
    program = b"".join(struct.pack("HBBI", *step) for step in [*steps, (answer, 0, 0, allow)])
    buffer = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    if libc.syscall(NUMBERS["seccomp"], 1, 0, header) != 0:
        raise OSError(ctypes.get_errno(), "the test's own filter was refused")


async def grades(path: Path) -> list[dict[str, Any]]:
    rows = []
    tries: list[tuple[Literal["auto", "cpython"], str]] = [
        ("cpython", PROGRAM.format(path=str(path))),
        ("cpython", HARMLESS),
        ("auto", HARMLESS),
    ]
    for interpreter, source in tries:
        grader = PythonGrader(source, LIMITS, interpreter=interpreter)
        result = await grader.grade(GradeRequest(item={}, output_text=""))
        await grader.close()
        rows.append({"reward": result.reward, "error": result.error, "message": result.error_message})
    return rows


def tried(case: Case, path: Path) -> list[dict[str, Any]]:
    """In a child, since a filter stays."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        take_away(case)
        with open(writing, "w") as pipe:
            json.dump(asyncio.run(grades(path)), pipe)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        rows: list[dict[str, Any]] = json.loads(pipe.read() or "[]")
    os.waitpid(child, 0)
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "ran"
        cases = []
        for case in CASES:
            rows = tried(case, path)
            cases.append({"layer": case.layer, "answer": case.answer, "rows": rows, "ran": path.exists()})
    json.dump({"uid": os.getuid(), "cases": cases}, sys.stdout)


if __name__ == "__main__":
    main()
