"""What Linux tells about processes: who descends from whom, and how to make sure that nobody outlives us.

Not covered: systems without /proc and prctl; there only direct children are known and stopped.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MARKER = "HONE_UP"
"""Environment variable that every process below `hone up` carries; its value is the home."""


class Process(NamedTuple):
    pid: int
    parent: int
    state: str
    start_ticks: int
    """Since boot; with the pid it names a process for good, because pids are reused."""


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def adopt_orphans() -> None:
    """From now on every descendant whose parent dies becomes our child, so that none can get lost."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def dying_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the child gets SIGKILL when the thread that forked it ends, so call this from the main thread."""
    parent = os.getpid()

    def prepare() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def read_process(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid=pid, parent=int(fields[1]), state=fields[0], start_ticks=int(fields[19]))


def all_processes() -> list[Process]:
    if not Path("/proc/self/stat").exists():
        return []
    found = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return [process for process in found if process is not None]


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether exactly this process still runs (a zombie does not)."""
    process = read_process(pid)
    return process is not None and process.start_ticks == start_ticks and process.state != "Z"


def descendants(ancestor: int) -> list[Process]:
    """Every living process below `ancestor`, parents before their children."""
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return [process for process in found if process.state != "Z"]


def kill(pid: int, signal_number: int) -> None:
    """Sends the signal; a process that has gone already is what the caller wants."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return


def reap_orphans(own: Iterable[int]) -> None:
    """Collects the exit codes of adopted processes; those in `own` are left to their Popen objects."""
    known = set(own)
    while sys.platform == "linux":
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in known:
            return
        os.waitpid(ended.si_pid, 0)


def children() -> frozenset[int]:
    """The processes that this one has started or adopted."""
    return frozenset(process.pid for process in all_processes() if process.parent == os.getpid())


def kill_orphans(own: Iterable[int]) -> None:
    """Kills the processes that we adopted (children of a dead child), with everything below them."""
    known = set(own)
    for process in all_processes():
        if process.parent == os.getpid() and process.pid not in known:
            for below in reversed(descendants(process.pid)):
                kill(below.pid, signal.SIGKILL)
            kill(process.pid, signal.SIGKILL)
    reap_orphans(known)


def kill_descendants(timeout_seconds: float = 8.0) -> bool:
    """Kills everything below us until nothing is left. False when something survived (a process stuck in the kernel)."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        alive = descendants(os.getpid())
        for process in alive:
            kill(process.pid, signal.SIGKILL)
        reap_orphans(())
        if not alive:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def marked(value: str) -> list[Process]:
    """Our user's living processes whose environment carries MARKER=value, the caller and its ancestors left out."""
    wanted = f"{MARKER}={value}".encode()
    lineage = _lineage(os.getpid())
    found = []
    for process in all_processes():
        if process.pid in lineage or process.state == "Z":
            continue
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in environment:
            found.append(process)
    return found


def _lineage(pid: int) -> set[int]:
    lineage: set[int] = set()
    process = read_process(pid)
    while process is not None and process.pid not in lineage:
        lineage.add(process.pid)
        process = read_process(process.parent)
    return lineage
