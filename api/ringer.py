"""Rings the doorbell on a thread of its own, so that a broker that is away or hangs delays no answer. Rings that pile up become one."""

import logging
from collections.abc import Callable
from threading import Event, Thread

logger = logging.getLogger("hone.api")
CLOSE_SECONDS = 5.0


class Ringer:
    def __init__(self, ring: Callable[[], bool]) -> None:
        self._ring = ring
        self._wanted, self._closed = Event(), Event()
        self._thread = Thread(target=self._run, name="doorbell", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """Returns at once; the bell rings soon after, once for all calls until then."""
        self._wanted.set()

    def close(self) -> None:
        """A ring that is wanted is still tried."""
        self._closed.set()
        self._wanted.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait()
            self._wanted.clear()
            self._try()

    def _try(self) -> None:
        try:
            if not self._ring():
                logger.warning("the broker cannot be reached; the sweep will find the job")
        except Exception:
            logger.exception("the doorbell failed; the sweep will find the job")
