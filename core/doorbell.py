"""Rings the workers: a Celery message without arguments that may be lost, doubled or late. The row in the database decides."""

from celery import Celery
from kombu.exceptions import OperationalError

from core.settings import Settings

JOBS_QUEUE = "jobs"
HOUSEKEEPING_QUEUE = "housekeeping"
WAKE = "worker.tasks.wake"
VALIDATE = "housekeeping.celery_app.validate_jobs"
PROBE = "housekeeping.celery_app.probe_graders"
REPORTS = "housekeeping.celery_app.make_reports"
SWEEP = "housekeeping.celery_app.sweep"


def make_celery(settings: Settings, name: str) -> Celery:
    """A Celery application whose dead broker neither holds a request nor ends a worker."""
    app = Celery(name, broker=settings.effective_broker_url())
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_acks_late=False,
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_timeout": 3, "socket_connect_timeout": 2, "max_retries": 1},
    )
    return app


class Doorbell:
    """Best effort only: ring after the commit; the sweep covers every lost ring."""

    def __init__(self, settings: Settings) -> None:
        self._celery = make_celery(settings, "doorbell")

    def wake_worker(self) -> bool:
        return self._send(WAKE, JOBS_QUEUE)

    def wake_validation(self) -> bool:
        return self._send(VALIDATE, HOUSEKEEPING_QUEUE)

    def wake_probe(self) -> bool:
        return self._send(PROBE, HOUSEKEEPING_QUEUE)

    def wake_reports(self) -> bool:
        return self._send(REPORTS, HOUSEKEEPING_QUEUE)

    def _send(self, task: str, queue: str) -> bool:
        try:
            self._celery.send_task(task, queue=queue, expires=60)
        except (OperationalError, OSError):
            return False
        return True
