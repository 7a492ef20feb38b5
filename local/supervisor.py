"""Starts processes, starts them again when they die, and stops them in order."""

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from local import processes
from local.parts import Part

LONGEST_DELAY = 30.0
ORPHAN_SEARCH_SECONDS = 5.0
HEALTHY_SECONDS = 60.0
"""A process that lived this long starts again at once when it dies; others wait twice as long each time."""

Say = Callable[[str], None]


@dataclass
class Running:
    part: Part
    process: subprocess.Popen[bytes]
    started_at: float
    deaths: int = 0
    """In a row, without HEALTHY_SECONDS of life between them."""
    restart_at: float | None = None
    """None while it runs; times are of time.monotonic()."""


@dataclass
class Supervisor:
    say: Say
    running: dict[str, Running] = field(default_factory=dict)
    searched_at: float = 0.0
    """When orphans were last looked for."""
    others: frozenset[int] = field(default_factory=processes.children)
    """Children that this process had before it supervised anything: they are nobody's orphans."""

    def start(self, part: Part) -> None:
        self.running[part.name] = Running(part, spawn(part), time.monotonic())

    def pids(self) -> list[int]:
        return [entry.process.pid for entry in self.running.values() if entry.restart_at is None]

    def ended(self) -> list[Running]:
        """Those that have died since they were last started."""
        return [entry for entry in self.running.values() if entry.restart_at is None and entry.process.poll() is not None]

    def tick(self) -> None:
        """Schedules what has died, starts what is due, collects orphans."""
        now = time.monotonic()
        dead = self.ended()
        for entry in dead:
            self._schedule(entry, now)
        for entry in self.running.values():
            if entry.restart_at is not None and now >= entry.restart_at:
                entry.process, entry.started_at, entry.restart_at = spawn(entry.part), now, None
        if dead or now - self.searched_at > ORPHAN_SEARCH_SECONDS:
            processes.kill_orphans([*self.pids(), *self.others])
            self.searched_at = now
        processes.reap_orphans([*self.pids(), *self.others])

    def _schedule(self, entry: Running, now: float) -> None:
        lived_well = now - entry.started_at >= HEALTHY_SECONDS
        entry.deaths = 1 if lived_well else entry.deaths + 1
        delay = min(LONGEST_DELAY, 2.0 ** (entry.deaths - 1))
        entry.restart_at = now + delay
        self.say(f"{entry.part.name} {describe_end(entry.process)}; starting it again in {delay:g} s (log: {entry.part.log}).")

    def stop(self, names: Iterable[str], is_urgent: Callable[[], bool]) -> None:
        """SIGTERM to all of `names`, SIGKILL when their time is over or `is_urgent` turns true."""
        entries = [self.running.pop(name) for name in list(names) if name in self.running]
        entries = [entry for entry in entries if entry.restart_at is None and entry.process.poll() is None]
        for entry in entries:
            entry.process.terminate()
        begin = time.monotonic()
        while entries and not is_urgent():
            waited = time.monotonic() - begin
            for entry in [entry for entry in entries if waited > entry.part.stop_seconds]:
                self.say(f"{entry.part.name} did not end within {entry.part.stop_seconds:g} s and is killed.")
                entry.process.kill()
            entries = [entry for entry in entries if entry.process.poll() is None]
            time.sleep(0.05)
        for entry in entries:
            entry.process.kill()
        for entry in entries:
            entry.process.wait(timeout=10)


def spawn(part: Part) -> subprocess.Popen[bytes]:
    """Starts the process with its output in its log. It dies with us."""
    with open(part.log, "ab") as log:
        return subprocess.Popen(
            part.command,
            env=dict(part.environment),
            cwd=part.log.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=processes.dying_with_parent(),
            process_group=0,
        )


def describe_end(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def log_tail(part: Part, lines: int = 15) -> str:
    """The last lines of its log, for a message."""
    text = part.log.read_bytes()[-16384:].decode(errors="replace") if part.log.exists() else ""
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])
