"""The model that a job starts from, as a plain folder on this host: where it lies already, or made once under `models_path`."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from core.errors import InvalidRequest, StorageError
from database.base_models import get_pinned_model
from database.checkpoints import checkpoint_files
from database.models import Checkpoint, CheckpointFile
from worker.context import CONVERT_COMMAND, Holding
from worker.fetch import fetch_file
from worker.trainer_process import TrainerProcess, start_converter

POLL_SECONDS = 0.2
LOG_END = 2000


def model_folder(holding: Holding, name: str, digest: str) -> Path:
    """Of the registered model `name`, as it was when the job was submitted.

    Raises: InvalidRequest where the source is gone or cannot be converted; NotFound, StorageError; LeaseLost, WindDown.
    """
    project = holding.claim.job.project_id
    source = holding.read(lambda session: get_pinned_model(session, project, name, digest)).source
    if source["type"] == "folder":
        return _existing(Path(source["path"]))
    if source["type"] == "checkpoint":
        return _fetched(holding, name, source["checkpoint"])
    return _converted(holding, name, source)


def _existing(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise InvalidRequest(f"This worker finds no model at {folder}.", code="model_not_available", param="model")
    return folder


def _converted(holding: Holding, name: str, source: dict[str, Any]) -> Path:
    target = holding.worker.settings.models_path / _key(source)
    with _locked(holding, target):
        if not target.is_dir():
            command = (*CONVERT_COMMAND, json.dumps(source), str(target))
            log = target.with_suffix(".log")
            code = _wait(holding, start_converter(command, log))
            if code != 0:
                end = log.read_text(errors="replace")[-LOG_END:].strip()
                raise InvalidRequest(f"The model '{name}' could not be converted: {end}", code="model_not_available", param="model")
    return target


def _key(source: dict[str, Any]) -> str:
    """Names the folder by what it is made of; a GGUF file that was replaced is another source."""
    facts = dict(source)
    if source["type"] == "gguf":
        path = Path(source["path"])
        if not path.is_file():
            raise InvalidRequest(f"This worker finds no model at {path}.", code="model_not_available", param="model")
        facts |= {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _wait(holding: Holding, process: TrainerProcess) -> int | None:
    try:
        while not process.has_ended():
            holding.check_wanted()
            time.sleep(POLL_SECONDS)
    finally:
        code = process.reap(timeout_seconds=10)
    return code


def _fetched(holding: Holding, name: str, checkpoint_id: str) -> Path:
    """A fine-tuned model's own weights. Adapters alone are no model to start from."""
    checkpoint, files = holding.read(lambda session: _checkpoint(session, checkpoint_id))
    if checkpoint.manifest["facts"].get("format") == "lora":
        message = f"'{name}' is a LoRA adapter; a job can start from a base model or from full weights."
        raise InvalidRequest(message, code="model_not_trainable", param="model")
    target = holding.worker.settings.models_path / checkpoint_id
    with _locked(holding, target):
        if not target.is_dir():
            aside = target.with_suffix(".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            for file in files:
                fetch_file(holding, file.blob, aside / file.name, file.bytes)
            os.replace(aside, target)
    return target


def _checkpoint(session: Session, checkpoint_id: str) -> tuple[Checkpoint, list[CheckpointFile]]:
    checkpoint = session.get(Checkpoint, checkpoint_id)
    if checkpoint is None:
        raise StorageError(f"The checkpoint {checkpoint_id} of the model is gone.", retryable=False)
    return checkpoint, checkpoint_files(session, checkpoint_id)


@contextmanager
def _locked(holding: Holding, target: Path) -> Iterator[None]:
    """One worker of this host at a time makes `target`; the others wait as long as their job is wanted."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "wb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holding.check_wanted()
                time.sleep(POLL_SECONDS)
        yield
