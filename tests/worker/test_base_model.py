"""Where the model of a job comes from: a folder as it lies, a source that is converted once, a checkpoint fetched once."""

import hashlib
import sys
from pathlib import Path

import pytest

from core.errors import InvalidRequest
from core.run_directory import FileEntry, Manifest
from core.settings import Settings
from database.base_models import register_model
from database.checkpoints import final_model, publish_checkpoint
from tests.worker.jobs import make_worker, submit
from worker import base_model
from worker.base_model import model_folder
from worker.context import Holding
from worker.tasks import claim_next

pytestmark = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
CONVERTER = (
    "import sys, pathlib; t = pathlib.Path(sys.argv[2]); t.mkdir(); (t / 'config.json').write_text('{}'); open(sys.argv[3], 'a').write('x')"
)


def hold(settings: Settings, source: dict) -> Holding:
    """A holding of a job whose model comes from `source`."""
    worker = make_worker(settings)
    with worker.database.transaction() as session:
        register_model(session, name="other", project_id=None, kind="base", source=source, digest="e" * 64)
    submit(worker, model="other", model_digest="e" * 64)
    return Holding(worker, claim_next(worker))


def folder_of(holding: Holding) -> Path:
    job = holding.claim.job
    return model_folder(holding, job.model, job.model_digest)


def test_gguf_file_is_converted_once_and_again_when_it_was_replaced(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, runs = tmp_path / "m.gguf", tmp_path / "runs"
    weights.write_bytes(b"a")
    command = (sys.executable, "-c", CONVERTER.replace("sys.argv[3]", repr(str(runs))))
    monkeypatch.setattr(base_model, "CONVERT_COMMAND", command)
    holding = hold(settings, {"type": "gguf", "path": str(weights)})
    first = folder_of(holding)
    assert (first / "config.json").exists()
    assert folder_of(holding) == first
    assert runs.read_text() == "x"
    weights.write_bytes(b"another")
    assert folder_of(holding) != first
    assert runs.read_text() == "xx"


def test_failed_conversion_names_the_model_and_the_converters_last_words(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "CONVERT_COMMAND", (sys.executable, "-c", "raise SystemExit('no such architecture')"))
    holding = hold(settings, {"type": "hub", "repo": "a/b", "revision": "c" * 40})
    with pytest.raises(InvalidRequest, match=r"(?s)'other'.*no such architecture") as caught:
        folder_of(holding)
    assert (caught.value.code, caught.value.param) == ("model_not_available", "model")


def test_folder_that_this_worker_does_not_have_is_said_so(settings: Settings) -> None:
    with pytest.raises(InvalidRequest, match="/nowhere"):
        folder_of(hold(settings, {"type": "folder", "path": "/nowhere"}))


@pytest.mark.parametrize("weights_format", ["full", "lora"])
def test_fine_tuned_model_is_fetched_whole_and_an_adapter_is_refused(settings: Settings, weights_format: str) -> None:
    worker = make_worker(settings)
    submit(worker)
    earlier = claim_next(worker)
    blob = worker.blobs.put([b"weights"], kind="checkpoint")
    entry = FileEntry(name="config.json", bytes=7, sha256=hashlib.sha256(b"weights").hexdigest())
    manifest = Manifest(kind="checkpoint", step=4, files=[entry], facts={"format": weights_format})
    with worker.database.transaction() as session:
        files = [("config.json", blob)]
        arguments = {"step": 4, "manifest": manifest, "files": files, "keep": 1}
        checkpoint = publish_checkpoint(session, earlier.job.id, earlier.token, **arguments)
        model = final_model(session, earlier.job.id, earlier.token, checkpoint)
    holding = Holding(worker, earlier)
    holding.claim.job.model, holding.claim.job.model_digest = model.name, model.digest
    if weights_format == "lora":
        with pytest.raises(InvalidRequest, match="adapter"):
            folder_of(holding)
    else:
        folder = folder_of(holding)
        assert (folder / "config.json").read_bytes() == b"weights"
        assert folder_of(holding) == folder
