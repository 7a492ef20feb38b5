"""Brings checkpoints and resume points out of the run directory: files into blobs, verified, then the row, under the token."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import select

from core.errors import LeaseLost, StorageError
from core.run_directory import CHECKPOINTS, RESUME_POINTS, Manifest, published, read_manifest
from database.blobs import BlobInfo
from database.checkpoints import publish_checkpoint, publish_resume_point
from database.models import Checkpoint
from worker.context import AWAY, Holding
from worker.relay import InvalidOutput, Relay

logger = logging.getLogger("hone.worker")
BLOCK = 1024 * 1024
LOOK_SECONDS = 1.0


class Publisher:
    """Publishes what appears in the attempt's own directory, from a thread of its own while the `with` block runs."""

    def __init__(self, holding: Holding, relay: Relay) -> None:
        self._holding, self._relay = holding, relay
        self._lock = threading.Lock()
        self._steps: set[int] = set()
        self._resume_step = -1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"publish {holding.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()

    def publish_checkpoints(self) -> None:
        """Every whole checkpoint that is not published yet, oldest first. Raises: LeaseLost, StorageError."""
        with self._lock:
            for folder in published(self._holding.directory, CHECKPOINTS):
                manifest = read_manifest(folder)
                if manifest.step not in self._steps:
                    _publish(self._holding, folder, manifest)
                    self._steps.add(manifest.step)

    def publish_resume_point(self) -> None:
        """The newest whole resume point, if it is not published yet; the lines before it are stored first, so none can be missing.

        Raises: LeaseLost, StorageError, InvalidOutput.
        """
        with self._lock:
            folders = published(self._holding.directory, RESUME_POINTS)
            manifest = read_manifest(folders[-1]) if folders else None
            if manifest is None or manifest.step <= self._resume_step:
                return
            self._relay.forward_new_lines()
            _publish(self._holding, folders[-1], manifest)
            self._resume_step = manifest.step

    def _run(self) -> None:
        """What fails here is tried again: at the next look, and for the last time when the trainer has ended."""
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                self.publish_checkpoints()
                self.publish_resume_point()
            except LeaseLost:
                return
            except FileNotFoundError:
                continue  # The trainer replaced it by a newer one while it was read.
            except InvalidOutput as error:
                self._holding.fail(error)
            except (StorageError, OSError, *AWAY) as error:
                logger.warning("%s: could not publish: %s", self._holding.job_id, error)


def adopt_checkpoints(holding: Holding, directory: Path, up_to_step: int) -> None:
    """Publishes what an earlier attempt left whole but unpublished in `directory`, up to where this one goes on.

    Raises: LeaseLost, StorageError.
    """
    query = select(Checkpoint.step).where(Checkpoint.job_id == holding.job_id)
    steps = holding.read(lambda session: set(session.execute(query).scalars()))
    for folder in published(directory, CHECKPOINTS):
        manifest = read_manifest(folder)
        if manifest.step not in steps and manifest.step <= up_to_step:
            _publish(holding, folder, manifest)


def _publish(holding: Holding, folder: Path, manifest: Manifest) -> None:
    files = _store(holding, folder, manifest)
    keep = 1 + int(holding.claim.job.options["keep_checkpoints"])
    job_id, token, step = holding.job_id, holding.token, manifest.step
    if manifest.kind == "checkpoint":
        holding.write(lambda session: publish_checkpoint(session, job_id, token, step=step, manifest=manifest, files=files, keep=keep))
    else:
        holding.write(lambda session: publish_resume_point(session, job_id, token, step=step, manifest=manifest, files=files))


def _store(holding: Holding, folder: Path, manifest: Manifest) -> list[tuple[str, BlobInfo]]:
    """The files of `manifest` as blobs. Raises: StorageError where one is not what the manifest says; LeaseLost."""
    files: list[tuple[str, BlobInfo]] = []
    for entry in manifest.files:
        info = holding.worker.blobs.put(_blocks(holding, folder / entry.name), kind=manifest.kind)
        if (info.sha256, info.bytes) != (entry.sha256, entry.bytes):
            holding.worker.blobs.delete(info.id)
            raise StorageError(f"{manifest.kind} of step {manifest.step}: {entry.name} is not what its manifest says.")
        files.append((entry.name, info))
    return files


def _blocks(holding: Holding, path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            holding.check_owned()
            if holding.publish_by is not None and time.monotonic() > holding.publish_by:
                raise StorageError(f"{path.name} was not published: the job was cancelled and its time is over.")
            yield block
