"""A contender is a process of its own that does one step when it is told to: times alternate, memory peaks do not mix.

The parent holds a `Contender`, the process a `Track`. Between steps the process sleeps in a read from its pipe.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STEP_SECONDS = 900.0
"""Longest wait for a step, or for the start of a process."""
LOG_END = 3000


class ContenderFailed(Exception):
    """A contender died or raised; the message ends with what it said last."""


class RaceOver(Exception):
    """Raised in the contender where it waits and no further step is wanted."""


@dataclass(frozen=True)
class Report:
    """What one step took."""

    seconds: dict[str, float]
    """By phase; `step` is the whole, from the word to go until the report."""

    tokens: int
    """Completion tokens of the step."""

    peak_bytes: int
    """The most memory that the contender has held since its start."""


class Track:
    """The contender's side."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._start = 0.0

    def ready(self, facts: dict[str, Any]) -> None:
        """Says that steps can begin, then waits for the first. Raises: RaceOver."""
        self._connection.send(facts)
        self._wait()

    def finish_step(self, phases: dict[str, float], tokens: int, peak_bytes: int) -> None:
        """Reports the step, then waits for the next. Raises: RaceOver."""
        seconds = {**phases, "step": time.perf_counter() - self._start}
        self._connection.send(Report(seconds, tokens, peak_bytes))
        self._wait()

    def _wait(self) -> None:
        try:
            self._connection.recv()
        except EOFError:
            raise RaceOver from None
        self._start = time.perf_counter()


class Contender:
    """The parent's side. `run(track, *arguments)` is called in a fresh process, which writes its output to `log`."""

    def __init__(self, name: str, log: Path, run: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_be_contender, args=(theirs, log, run, arguments), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._receive()
        """What the contender said of itself when it was ready."""

    def step(self) -> Report:
        """Raises: ContenderFailed."""
        with suppress(ConnectionError):
            self._connection.send("step")
        report: Report = self._receive()
        return report

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _receive(self) -> Any:
        message = None
        try:
            if self._connection.poll(STEP_SECONDS):
                message = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=30)
        if message is None:
            self._process.kill()
            said = self._log.read_text(errors="replace")[-LOG_END:] if self._log.exists() else ""
            raise ContenderFailed(f"{self.name} gave no report within {STEP_SECONDS:.0f} s or died.\n{said}")
        return message


def _be_contender(connection: Connection, log: Path, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with suppress(RaceOver):
        run(Track(connection), *arguments)
