"""What a housekeeping process has, shared by its threads."""

import threading
from dataclasses import dataclass, field

from core.doorbell import Doorbell
from core.settings import Settings
from database.blobs import BlobStore
from database.session import Database, open_database
from graders.shared_limits import SharedLimits
from outbound.safe_http import NetworkPolicy


@dataclass(frozen=True)
class Housekeeping:
    settings: Settings
    database: Database
    blobs: BlobStore
    doorbell: Doorbell
    validating: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one thread that validates, so that the sweep always finds another."""

    reporting: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one thread that makes reports about graders, for the same reason."""

    tries: dict[str, int] = field(default_factory=dict)
    """How often the validation of a job broke; only the thread that validates touches it."""

    @property
    def network(self) -> NetworkPolicy:
        """Where calls to graders may go."""
        return NetworkPolicy(self.settings.allowed_private_networks, self.settings.allow_http_graders)

    def limits(self, project_id: str) -> SharedLimits:
        """Under which it calls the project's services: those of the project's jobs, taking turns with each of these."""
        return SharedLimits(self.settings.effective_broker_url(), project_id, owner="housekeeping")


def open_housekeeping(settings: Settings) -> Housekeeping:
    database = open_database(settings)
    return Housekeeping(settings=settings, database=database, blobs=BlobStore(database, settings), doorbell=Doorbell(settings))
