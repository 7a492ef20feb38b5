"""What every request shares: opened once per process when the application starts, closed when it ends."""

from dataclasses import dataclass

from anyio import CapacityLimiter
from fastapi import FastAPI, Request

from api.ringer import Ringer
from core.doorbell import Doorbell
from core.settings import Settings
from database.blobs import BlobStore
from database.secrets import Secrets, load_secrets
from database.session import Database, open_database
from outbound.safe_http import NetworkPolicy

CONCURRENT_UPLOADS = 16
CONCURRENT_GRADER_RUNS = 8
CONCURRENT_SUBMISSIONS = 16


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    blobs: BlobStore
    secrets: Secrets
    validation_bell: Ringer
    """Tells housekeeping that a job waits to be validated."""

    report_bell: Ringer
    """Tells housekeeping that a report about a grader is wanted."""

    network: NetworkPolicy
    uploads: CapacityLimiter
    """Threads for uploads, so that slow senders cannot take those that answer everybody else."""

    grader_runs: CapacityLimiter
    """Threads for `graders/run`, which wait for graders."""

    submissions: CapacityLimiter
    """Threads for new jobs, which may wait for the sandbox to load a grader's program."""

    def close(self) -> None:
        self.validation_bell.close()
        self.report_bell.close()
        self.database.close()


def open_services(settings: Settings) -> Services:
    """Raises: StorageError or a database error when this installation cannot be opened."""
    database = open_database(settings)
    return Services(
        settings=settings,
        database=database,
        blobs=BlobStore(database, settings),
        secrets=load_secrets(settings),
        validation_bell=Ringer(Doorbell(settings).wake_validation),
        report_bell=Ringer(Doorbell(settings).wake_reports),
        network=NetworkPolicy(settings.allowed_private_networks, settings.allow_http_graders),
        uploads=CapacityLimiter(CONCURRENT_UPLOADS),
        grader_runs=CapacityLimiter(CONCURRENT_GRADER_RUNS),
        submissions=CapacityLimiter(CONCURRENT_SUBMISSIONS),
    )


def services_of(app: FastAPI) -> Services:
    services = app.state.services
    assert isinstance(services, Services)
    return services


async def get_services(request: Request) -> Services:
    """A dependency. Async only because FastAPI would send it to a thread otherwise."""
    return services_of(request.app)
