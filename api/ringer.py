"""Rings the doorbell on a thread of its own, so that a broker that is away or hangs delays no answer. Rings that pile up become one."""

import logging
from collections.abc import Callable
from threading import Condition, Thread

logger = logging.getLogger("hone.api")
CLOSE_SECONDS = 2.0


class Ringer:
    def __init__(self, ring: Callable[[], bool]) -> None:
        self._ring = ring
        self._is_wanted = self._is_closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="doorbell", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """Returns at once; the bell rings soon after, once for all calls until then."""
        with self._changed:
            self._is_wanted = True
            self._changed.notify()

    def close(self) -> None:
        """A ring that is wanted is still tried."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while self._wait():
            self._try()

    def _wait(self) -> bool:
        """Until a ring is wanted; False when closed before that."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_wanted or self._is_closed)
            is_wanted, self._is_wanted = self._is_wanted, False
            return is_wanted

    def _try(self) -> None:
        try:
            if not self._ring():
                logger.warning("the broker cannot be reached; the sweep will find the job")
        except Exception:
            logger.exception("the doorbell failed; the sweep will find the job")
