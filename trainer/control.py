"""Signs of life for the worker, and what it asks for: `beat`, `progress` and the `control` file. Decides nothing."""

import signal
import threading
import time
from pathlib import Path

from core.run_directory import BEAT, PROGRESS, Control, read_control

BEAT_SECONDS = 1.0
PROGRESS_SECONDS = 0.5


class StopRequested(Exception):
    """The worker asks the run to stop. Raised only where the weights are those of a whole step."""

    def __init__(self, control: Control) -> None:
        super().__init__(control.value)
        self.control = control


class Pulse:
    """Touches `beat` from a thread as long as the process lives, and `progress` whenever work gets done."""

    def __init__(self, run_directory: Path) -> None:
        self._beat, self._progress = run_directory / BEAT, run_directory / PROGRESS
        self._last_progress = 0.0
        self._stopped = threading.Event()
        self._beat.touch()
        self._progress.touch()
        self._thread = threading.Thread(target=self._keep_beating, name="beat", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            self._progress.touch()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _keep_beating(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._beat.touch()


class ControlReader:
    """Turns the `control` file and SIGTERM into StopRequested; the file is the more precise of the two and wins."""

    def __init__(self, run_directory: Path, pulse: Pulse) -> None:
        self._run_directory = run_directory
        self._pulse = pulse
        self._terminated = False

    def install(self) -> None:
        """From now on SIGTERM and Ctrl-C mean `drain`. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.terminate())

    def terminate(self) -> None:
        self._terminated = True

    def check(self) -> None:
        """Counts as progress. Raises: StopRequested."""
        self._pulse.progress()
        self.check_waiting()

    def check_waiting(self) -> None:
        """The same while nothing but time goes by: no sign of progress. Raises: StopRequested."""
        control = read_control(self._run_directory)
        if control is None and self._terminated:
            control = Control.DRAIN
        if control is not None:
            raise StopRequested(control)
