"""Helpers for tests about processes: they watch /proc, because only the kernel knows who is still alive."""

import time
from collections.abc import Callable
from pathlib import Path

MARKER = "HONE_UP="


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def alive_with(text: str) -> list[int]:
    """Pids of living processes whose environment or command line contains `text`."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            content = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text.encode() in content and state != "Z":
            found.append(int(folder.name))
    return found


def parents() -> dict[int, int]:
    """pid -> parent of every process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return found


def tree_of(pid: int) -> set[int]:
    """Every process below `pid`."""
    above = parents()
    tree = {pid}
    while True:
        more = {child for child, parent in above.items() if parent in tree} - tree
        if not more:
            return tree - {pid}
        tree |= more
