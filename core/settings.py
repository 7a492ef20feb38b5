"""The environment of an installation, read once per process. Refuses unsafe values; holds no request data."""

from functools import lru_cache
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="HONE_", extra="ignore", frozen=True, use_attribute_docstrings=True)

    home: Path = Field(default=Path("~/.hone"), validate_default=True)
    """Everything that this installation keeps on this machine."""

    database_url: str = ""
    """SQLAlchemy URL. Empty: SQLite in `home`."""

    broker_url: SecretStr = SecretStr("")
    """Celery broker. Empty: the embedded Valkey's unix socket in `home`."""

    blob_url: str = ""
    """Empty: chunks in the database. Otherwise a folder (`file:///...`) or an object store (`s3://bucket/prefix`)."""

    secret_key: SecretStr = SecretStr("")
    """Fernet keys for stored secrets, newest first, separated by commas. Empty: `home/secret_key`."""

    allowed_private_networks: Annotated[tuple[str, ...], NoDecode] = ()
    """Networks in CIDR form, separated by commas, that outgoing calls may reach although they are not public."""

    allow_http_graders: bool = False
    """Whether grader URLs may be plain http (always allowed towards `allowed_private_networks`)."""

    grader_patience_seconds: float = Field(default=60.0, ge=0)
    """How long a step waits for a grader that is away before its job pauses (`grader_unavailable`) and frees its worker."""
    grader_probe_seconds: float = Field(default=15.0, gt=0)
    """How long after a failed probe the grader of a paused job is probed again: twice as long each time, up to half an hour."""

    lease_seconds: float = Field(default=120.0, gt=0)
    """How long a worker owns a job without renewing its lease, by the database's clock."""
    wind_down_seconds: float = Field(default=120.0, gt=0)
    """How long a trainer may take to write its resume point when a job is paused or its worker drained."""
    cancel_grace_seconds: float = Field(default=30.0, gt=0)
    """From SIGTERM to SIGKILL of a cancelled job's processes."""
    stall_seconds: float = Field(default=1800.0, gt=0)
    """A trainer without progress for this long is killed and its job retried."""
    sweep_seconds: float = Field(default=15.0, gt=0)
    """How often housekeeping looks for expired leases and waiting jobs."""
    max_attempts: int = Field(default=5, ge=1)
    """Ends by fault in a row, without a new resume point between them, after which a job fails."""

    min_training_rows: int = Field(default=10, ge=1)
    """Fewer rows fail the job (`invalid_n_examples`)."""
    max_training_rows: int = Field(default=50_000, ge=1)
    """More rows fail the job (`invalid_n_examples`)."""
    max_upload_bytes: int = Field(default=512 * 1024 * 1024, ge=1)
    """Largest file that may be uploaded."""
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1)
    """Largest body of any other request."""
    organization_id: str = "org-hone"
    """`organization_id` of every job; part of the names of fine-tuned models."""
    worker_name: str = ""
    """Shown in attempts. Empty: host name and process id."""

    gpu_class: str = "any"
    """The class of device that this worker offers."""

    num_threads: int = Field(default=0, ge=0)
    """CPU threads for one trainer. 0: all cores of the machine, divided by its workers once."""

    @field_validator("home")
    @classmethod
    def _expand(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator("allowed_private_networks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
        for part in parts:
            ip_network(part)
        return parts

    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'hone.db'}"

    def effective_blob_database_url(self) -> str:
        return blob_database_url(self.effective_database_url())

    def effective_broker_url(self) -> str:
        return self.broker_url.get_secret_value() or f"redis+socket://{self.socket_path}?virtual_host=0"

    @property
    def socket_path(self) -> Path:
        """The embedded broker's unix socket, in a folder of mode 0700."""
        return self.home / "run" / "valkey.sock"

    @property
    def runs_path(self) -> Path:
        return self.home / "runs"

    @property
    def models_path(self) -> Path:
        return self.home / "models"


def blob_database_url(database_url: str) -> str:
    """Where the blob tables lie: `blobs.db` beside an SQLite file (a write lock of its own), else the same database."""
    if not database_url.startswith("sqlite"):
        return database_url
    address, mark, options = database_url.partition("?")
    return f"{address.rpartition('/')[0]}/blobs.db{mark}{options}"


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    return Settings()
