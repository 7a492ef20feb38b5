"""What a worker process has, and what its threads share about the one job it holds. Trains nothing."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from core.errors import LeaseLost, PlatformError
from core.lifecycle import Status
from core.settings import Settings
from database.blobs import BlobStore
from database.leases import Claim
from database.secrets import Secrets, load_secrets
from database.session import Database, open_database

logger = logging.getLogger("hone.worker")
Result = TypeVar("Result")
AWAY = (OperationalError, InterfaceError, PoolTimeout)
"""What a database that cannot be reached, or is too busy, raises."""

PARK_SECONDS = 3600.0
"""How long an attempt waits for a database that is away before it gives up."""

RETRY_SECONDS = 1.0
TRAINER_COMMAND = (sys.executable, "-m", "trainer")
CONVERT_COMMAND = (sys.executable, "-m", "trainer.convert")


class WindDown(PlatformError):
    """The job is no longer wanted here: cancelled, paused, or the worker is going down. Nobody's fault and never shown."""


class WorkerFailed(PlatformError):
    """Something in the worker broke, not in the job."""

    code = "worker_failed"
    retryable = True


@dataclass(frozen=True)
class Worker:
    """One worker process; opened once, shared by its threads."""

    settings: Settings
    database: Database
    blobs: BlobStore
    secrets: Secrets
    name: str
    host: str
    device: str
    trainer_command: tuple[str, ...] = TRAINER_COMMAND
    """Started with the run directory and `--secrets-fd N` appended."""

    drain: threading.Event = field(default_factory=threading.Event)
    """Set when this process is to end."""

    @property
    def num_threads(self) -> int:
        """Of one trainer: by setting, else every core that this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.settings.num_threads or cores


def open_worker(settings: Settings, trainer_command: tuple[str, ...] = TRAINER_COMMAND) -> Worker:
    """Raises: StorageError without a secret key."""
    database = open_database(settings)
    host = os.uname().nodename
    return Worker(
        settings=settings,
        database=database,
        blobs=BlobStore(database, settings),
        secrets=load_secrets(settings),
        name=settings.worker_name or f"{host}:{os.getpid()}",
        host=host,
        device=os.environ.get("CUDA_VISIBLE_DEVICES") or "cpu",
        trainer_command=trainer_command,
    )


class Holding:
    """One attempt's hold on its job: who writes it says which thread. Only facts; what follows from them is `watch`'s."""

    def __init__(self, worker: Worker, claim: Claim) -> None:
        self.worker = worker
        self.claim = claim
        self.job_id, self.token, self.attempt = claim.job.id, claim.token, claim.attempt
        self.wanted = Status.RUNNING
        """What the user wants, as of the last heartbeat."""

        self.renewed_at = time.monotonic()
        """When the last accepted heartbeat was sent."""

        self.is_lost = threading.Event()
        """Another attempt has the job, or nobody knows: this one writes nothing any more."""

        self.publish_by: float | None = None
        """Set at the end of a cancelled job: what is not published by then never will be."""

        self.error: PlatformError | None = None
        """Why the worker itself ended the trainer; the first reason stays."""

    @property
    def directory(self) -> Path:
        return self.worker.settings.runs_path / self.job_id / str(self.attempt)

    def renewed(self, sent_at: float, wanted: Status) -> None:
        self.renewed_at = sent_at
        self.wanted = wanted

    def fail(self, error: PlatformError) -> None:
        self.error = self.error or error

    def check_owned(self) -> None:
        """Raises: LeaseLost."""
        if self.is_lost.is_set():
            raise LeaseLost(f"The lease on {self.job_id} was lost.")

    def check_wanted(self) -> None:
        """Raises: LeaseLost, WindDown."""
        self.check_owned()
        if self.wanted != Status.RUNNING or self.worker.drain.is_set():
            raise WindDown(f"{self.job_id} is no longer wanted here.")

    def write(self, work: Callable[[Session], Result]) -> Result:
        """`work` in one transaction; again and again while the database is away. Raises: LeaseLost."""
        return self._insist(self.worker.database.transaction, work)

    def read(self, work: Callable[[Session], Result]) -> Result:
        """As `write`, without taking the database's write lock."""
        return self._insist(self.worker.database.reading, work)

    def _insist(self, open_session: Callable[[], AbstractContextManager[Session]], work: Callable[[Session], Result]) -> Result:
        give_up_at = time.monotonic() + PARK_SECONDS
        while True:
            self.check_owned()
            try:
                with open_session() as session:
                    return work(session)
            except AWAY as error:
                logger.warning("%s: the database is away: %s", self.job_id, error)
                if time.monotonic() > give_up_at:
                    raise
            self.is_lost.wait(RETRY_SECONDS)
