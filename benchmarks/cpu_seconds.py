"""Processor time of whole process trees, from /proc: what every process used itself, and what its ended children had used."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """User and system time of one process, in seconds."""

    parent: int
    command: str
    """Its arguments, each with a space behind."""

    own: float
    reaped: float
    """Of children that have ended and were waited for, and of theirs."""


Tree = dict[int, Usage]
"""By process id."""


def read_tree(root: int) -> Tree:
    """`root` and everything that descends from it and is still there."""
    everyone = {pid: usage for pid in _pids() if (usage := _read(pid)) is not None}
    found, members = {root}, {root}
    while members:
        members = {pid for pid, usage in everyone.items() if usage.parent in members} - found
        found |= members
    return {pid: everyone[pid] for pid in found if pid in everyone}


def total_seconds(tree: Tree) -> float:
    """Of all processes that are or ever were below the root; never falls from one reading to the next."""
    return sum(usage.own + usage.reaped for usage in tree.values())


def seconds_by_role(tree: Tree, words: Mapping[str, str], children: Mapping[str, str]) -> dict[str, float]:
    """`total_seconds` by role: the first of `words` (role -> part of a command line) that fits, else the role of the parent.

    `children`: role -> the role that all its ended children had; else they count as their parent.
    """
    used = dict.fromkeys([*words, ""], 0.0)
    for pid, usage in tree.items():
        role = _role(tree, pid, words)
        used[role] += usage.own
        used[children.get(role, role)] += usage.reaped
    return used


def _role(tree: Tree, pid: int, words: Mapping[str, str]) -> str:
    if pid not in tree:
        return ""
    usage = tree[pid]
    return next((role for role, part in words.items() if part in usage.command), "") or _role(tree, usage.parent, words)


def _pids() -> Iterable[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _read(pid: int) -> Usage | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    user, system, reaped_user, reaped_system = (int(field) / TICKS_PER_SECOND for field in fields[11:15])
    return Usage(int(fields[1]), command, user + system, reaped_user + reaped_system)
