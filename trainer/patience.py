"""How long a step waits for its grader. Told once when it begins and once when the grader is back."""

import time
from typing import Any, Literal, Protocol

from core.errors import GraderUnavailable


class Announce(Protocol):
    def __call__(self, message: str, level: Literal["info", "warn", "error"] = "info", *, data: dict[str, Any] | None = None) -> None: ...


class Patience:
    """Of one step or evaluation. There are two reasons to wait: the grader is away, or too much of what it answered is failure."""

    def __init__(self, seconds: float, step: int, announce: Announce) -> None:
        self._seconds, self._step, self._announce = seconds, step, announce
        self._since: float | None = None
        """time.monotonic(); None while nothing is waited for."""

        self._why = ""
        self._ends_with_outage = False

    @property
    def is_waiting(self) -> bool:
        return self._since is not None

    def begin(self, since: float, why: str) -> None:
        """Goes on where it has begun. Raises: GraderUnavailable when it is over."""
        self._why = f"Step {self._step}: {why}"
        if self._since is None:
            self._since = since
            data = {"code": GraderUnavailable.code, "step": self._step, "patience_seconds": self._seconds}
            self._announce(f"Waiting for the grader. {self._why}", "warn", data=data)
        self._check()

    def follow(self, outage_since: float | None, why: str) -> None:
        """Begins with an outage and ends with it, unless there is another reason to wait. Raises: GraderUnavailable."""
        if outage_since is not None:
            self._ends_with_outage |= self._since is None
            self.begin(outage_since, why)
        elif self._ends_with_outage:
            self.end()
        self._check()

    def end(self) -> None:
        if self._since is not None:
            seconds = time.monotonic() - self._since
            data = {"code": "grader_available", "step": self._step, "waited_seconds": seconds}
            self._announce(f"The grader answers again after {seconds:.0f} s.", data=data)
        self._since, self._ends_with_outage = None, False

    def _check(self) -> None:
        if self._since is not None and time.monotonic() - self._since >= self._seconds:
            raise GraderUnavailable(self._why)
