"""Decides, four times a second, what the trainer is told: to wind down, to stop at once, to wait. Touches no database.

So a hanging write, grader or database cannot keep a cancelled job's device.
"""

import logging
import signal
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from core.errors import TrainerStalled
from core.lifecycle import Status
from core.run_directory import BEAT, PROGRESS, Control, write_control
from worker.context import PARK_SECONDS, Holding, WorkerFailed
from worker.trainer_process import TrainerProcess

logger = logging.getLogger("hone.worker")
TICK_SECONDS = 0.25
BEAT_SECONDS = 60.0
"""A trainer whose own thread does not even touch `beat` for so long is stuck as a whole."""

START_SECONDS = 600.0
"""Until the first touch: importing torch from a cold disk takes its time."""

URGENCY = (None, Control.DRAIN, Control.PAUSE, Control.CANCEL)


class Sign:
    """A file that is touched as a sign of life. Ages by our own clock, so that a jump of the wall clock kills nobody."""

    def __init__(self, path: Path, now: float) -> None:
        self._path = path
        self._seen: int | None = None
        self._changed_at = now

    def age(self, now: float) -> float:
        """Seconds since the last touch that we saw (or since the start)."""
        touched = self._path.stat().st_mtime_ns if self._path.exists() else None
        if touched != self._seen:
            self._seen, self._changed_at = touched, now
        return now - self._changed_at

    def forgive(self, now: float) -> None:
        self._changed_at = now

    @property
    def exists(self) -> bool:
        return self._seen is not None


class Watch:
    """Watches over one trainer while the `with` block runs."""

    def __init__(self, holding: Holding, process: TrainerProcess, now: float) -> None:
        self._holding, self._process = holding, process
        self._settings = holding.worker.settings
        self._beat, self._progress = Sign(holding.directory / BEAT, now), Sign(holding.directory / PROGRESS, now)
        self._asked: Control | None = None
        self._deadline: float | None = None
        self._parked_at: float | None = None
        self.killed_at: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {holding.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def tick(self, now: float) -> None:
        """What has to happen at the time `now` (monotonic)."""
        if self.killed_at is not None:
            return
        if self._holding.is_lost.is_set() or self._holding.error is not None:
            self._kill(now)
            return
        self._ask(now)
        self._park(now)
        self._look_for_life(now)
        if self._deadline is not None and now >= self._deadline:
            self._kill(now)

    def _ask(self, now: float) -> None:
        """Tells the trainer what the user or the worker wants; a stronger wish replaces a weaker one."""
        control = self._wish()
        if URGENCY.index(control) <= URGENCY.index(self._asked):
            return
        assert control is not None
        self._asked = control
        is_cancel = control == Control.CANCEL
        self._deadline = now + (self._settings.cancel_grace_seconds if is_cancel else self._settings.wind_down_seconds)
        try:
            write_control(self._holding.directory, control)
        except OSError as error:
            logger.warning("%s: cannot write the control file: %s", self._holding.job_id, error)
            self._process.send(signal.SIGTERM)
        if is_cancel:
            self._process.send(signal.SIGTERM)

    def _wish(self) -> Control | None:
        if self._holding.wanted == Status.PAUSED:
            return Control.PAUSE
        if self._holding.wanted == Status.QUEUED or (self._holding.wanted == Status.RUNNING and self._holding.worker.drain.is_set()):
            return Control.DRAIN
        return None if self._holding.wanted == Status.RUNNING else Control.CANCEL

    def _park(self, now: float) -> None:
        """Freezes the trainer while the lease has passed unrenewed: another attempt may be at work by then."""
        is_expired = now - self._holding.renewed_at > self._settings.lease_seconds
        if is_expired and self._parked_at is None:
            logger.warning("%s: the lease passed without a renewal, the trainer waits", self._holding.job_id)
            self._process.send_group(signal.SIGSTOP)
            self._parked_at = now
        elif not is_expired and self._parked_at is not None:
            self._process.send_group(signal.SIGCONT)
            self._parked_at = None
            self._beat.forgive(now)
            self._progress.forgive(now)
        elif self._parked_at is not None and now - self._parked_at > PARK_SECONDS:
            self._holding.is_lost.set()

    def _look_for_life(self, now: float) -> None:
        if self._parked_at is not None:
            return
        beat_age, progress_age = self._beat.age(now), self._progress.age(now)
        beat_limit = BEAT_SECONDS if self._beat.exists else START_SECONDS
        if beat_age > beat_limit:
            self._holding.fail(TrainerStalled(f"The trainer gave no sign of life for {beat_limit:g} s."))
        elif progress_age > self._settings.stall_seconds:
            self._holding.fail(TrainerStalled(f"The trainer made no progress for {self._settings.stall_seconds:g} s."))

    def _kill(self, now: float) -> None:
        self._process.send_group(signal.SIGKILL)
        self.killed_at = now

    def _run(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            try:
                self.tick(time.monotonic())
            except Exception as error:
                logger.exception("%s: the watch over the trainer broke", self._holding.job_id)
                self._holding.fail(WorkerFailed(f"The watch over the trainer broke: {type(error).__name__}: {error}"))
