"""Blobs as files on this host."""

from pathlib import Path

from core.errors import StorageError
from worker.context import Holding


def fetch_file(holding: Holding, blob: str, target: Path, num_bytes: int | None = None) -> None:
    """Every chunk is verified on the way. Raises: StorageError, also for another size than `num_bytes`; LeaseLost, WindDown."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with open(target, "wb") as file:
        for chunk in holding.worker.blobs.read(blob):
            holding.check_wanted()
            size += file.write(chunk)
    if num_bytes is not None and size != num_bytes:
        raise StorageError(f"{target.name} has {size} bytes instead of {num_bytes}.", retryable=False)
