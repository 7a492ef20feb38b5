"""What nobody else notices: leases that passed, rings that were lost, bytes that no row names. Runs every `sweep_seconds`."""

import logging
import threading

from database.jobs import jobs_to_validate
from database.leases import count_queued, expire_leases
from database.probes import is_probe_due
from database.reports import is_report_due
from housekeeping.context import Housekeeping

logger = logging.getLogger("hone.housekeeping")
MAX_RINGS = 4
COLLECT_SECONDS = 600.0


class Sweep:
    """One per process; remembers since when it has reached the database without a gap."""

    def __init__(self, housekeeping: Housekeeping, now: float) -> None:
        self._housekeeping = housekeeping
        self._reached_since: float | None = None
        self._last_reached: float | None = None
        self._collected_at = now
        self._lock = threading.Lock()

    def run(self, now: float) -> None:
        """One sweep at the time `now` (monotonic). A sweep that is still at work is not joined by a second one."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._sweep(now)
        finally:
            self._lock.release()

    def may_expire(self, now: float) -> bool:
        """Whether workers had a whole lease in which they could reach the database.

        Else a database that comes back after an outage would take every job from its worker.
        """
        settings = self._housekeeping.settings
        max_gap = max(3 * settings.sweep_seconds, settings.lease_seconds / 2)
        if self._last_reached is None or now - self._last_reached > max_gap:
            self._reached_since = now
        self._last_reached = now
        assert self._reached_since is not None
        return now - self._reached_since >= settings.lease_seconds

    def _sweep(self, now: float) -> None:
        housekeeping = self._housekeeping
        try:
            with housekeeping.database.transaction() as session:
                if self.may_expire(now):
                    requeued = expire_leases(session, max_attempts=housekeeping.settings.max_attempts)
                    if requeued:
                        logger.warning("%d jobs went back to the queue: their workers stopped answering", requeued)
                num_queued = count_queued(session)
                is_validation_due = bool(jobs_to_validate(session, 1))
                is_a_probe_due = is_probe_due(session)
                are_reports_due = is_report_due(session)
        except Exception:
            self._last_reached = None
            raise
        self._ring(num_queued, is_validation_due=is_validation_due)
        if is_a_probe_due:
            housekeeping.doorbell.wake_probe()
        if are_reports_due:
            housekeeping.doorbell.wake_reports()
        if now - self._collected_at >= COLLECT_SECONDS:
            self._collected_at = now
            housekeeping.blobs.collect()

    def _ring(self, num_queued: int, *, is_validation_due: bool) -> None:
        for _ in range(min(num_queued, MAX_RINGS)):
            self._housekeeping.doorbell.wake_worker()
        if is_validation_due:
            self._housekeeping.doorbell.wake_validation()
