"""`celery -A worker.celery_app worker -P threads -c 1 -Q jobs`. Never imports torch: training happens in a child process."""

from typing import Any

from celery.signals import worker_init, worker_ready, worker_shutting_down

from core.doorbell import Doorbell, make_celery
from core.settings import load_settings
from worker.tasks import this_worker

app = make_celery(load_settings(), "worker")


def open_everything(**_: Any) -> None:
    this_worker()


def look_for_work(**_: Any) -> None:
    """What was rung while no worker was there has been lost."""
    Doorbell(load_settings()).wake_worker()


def wind_down(**_: Any) -> None:
    """The running job goes back to the queue with a resume point."""
    this_worker().drain.set()


worker_init.connect(open_everything)
worker_ready.connect(look_for_work)
worker_shutting_down.connect(wind_down)
