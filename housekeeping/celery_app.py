"""`celery -A housekeeping.celery_app worker -P threads -c 3 -Q housekeeping -B`: the clock and the tasks of housekeeping."""

import threading
import time
from functools import cache
from typing import NamedTuple

from core.doorbell import HOUSEKEEPING_QUEUE, PROBE, REPORTS, SWEEP, VALIDATE, make_celery
from core.settings import load_settings
from database.secrets import load_secrets
from housekeeping.context import Housekeeping, open_housekeeping
from housekeeping.probe_graders import GraderProbe
from housekeeping.reports import make_waiting_reports
from housekeeping.sweep import Sweep
from housekeeping.validate_job import validate_waiting_jobs

app = make_celery(load_settings(), "housekeeping")
app.conf.beat_schedule = {
    "sweep": {
        "task": SWEEP,
        "schedule": load_settings().sweep_seconds,
        "options": {"queue": HOUSEKEEPING_QUEUE, "expires": max(1.0, 2 * load_settings().sweep_seconds)},
    }
}
app.conf.beat_max_loop_interval = 5
_opening = threading.Lock()


class Opened(NamedTuple):
    housekeeping: Housekeeping
    sweep: Sweep
    probe: GraderProbe


@cache
def _opened() -> Opened:
    housekeeping = open_housekeeping(load_settings())
    probe = GraderProbe(housekeeping, load_secrets(housekeeping.settings))
    return Opened(housekeeping, Sweep(housekeeping, time.monotonic()), probe)


def this_process() -> Opened:
    """Opened by the first task, not at import: the clock runs in a process that is forked before."""
    with _opening:
        return _opened()


def _validate_jobs() -> None:
    validate_waiting_jobs(this_process().housekeeping)


def _make_reports() -> None:
    make_waiting_reports(this_process().housekeeping)


def _sweep() -> None:
    this_process().sweep.run(time.monotonic())


def _probe_graders() -> None:
    this_process().probe.run()


probe_graders = app.task(name=PROBE)(_probe_graders)
validate_jobs = app.task(name=VALIDATE)(_validate_jobs)
make_reports = app.task(name=REPORTS)(_make_reports)
sweep = app.task(name=SWEEP)(_sweep)
