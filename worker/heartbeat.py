"""Renews the lease from a thread of its own and learns what the user wants. Kills nothing: that is `watch`'s."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from core.errors import LeaseLost
from database.leases import renew_lease
from worker.context import AWAY, Holding

logger = logging.getLogger("hone.worker")
MAX_INTERVAL_SECONDS = 5.0
"""However long the lease: a cancelled job must be noticed soon enough to free its device within 45 s."""


class Heartbeat:
    """Beats while the `with` block runs."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._lease_seconds = holding.worker.settings.lease_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat {holding.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()

    def beat(self) -> None:
        """One renewal. A database that is away leaves everything as it was; a refusal ends the hold for good."""
        sent_at = time.monotonic()
        holding = self._holding
        try:
            with holding.worker.database.transaction() as session:
                wanted = renew_lease(session, holding.job_id, holding.token, self._lease_seconds)
        except LeaseLost:
            holding.is_lost.set()
        except AWAY as error:
            logger.warning("%s: no heartbeat: %s", holding.job_id, error)
        else:
            holding.renewed(sent_at, wanted)

    def _run(self) -> None:
        interval = min(self._lease_seconds / 4, MAX_INTERVAL_SECONDS)
        while not self._stopped.wait(interval) and not self._holding.is_lost.is_set():
            self.beat()
