"""What a run directory is filled with. Resume points and damaged files are in test_runner.py."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from core.grader_specs import PinnedGraderSpec
from core.settings import Settings
from tests.worker.jobs import make_worker, submit
from worker.context import Holding
from worker.prepare import prepare
from worker.tasks import claim_next

JUDGE: dict[str, Any] = {
    "type": "score_model",
    "base_url": "https://judge.example.com/v1",
    "model": "judge-1",
    "input": [{"role": "user", "content": "{{sample.output_text}}"}],
}


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_keys_of_judges_are_handed_over_beside_the_directory_never_in_it(settings: Settings) -> None:
    members = {"a": {**JUDGE, "secret_ref": "inline:a"}, "b": {**JUDGE, "secret_ref": "inline:b"}}
    raw = {"type": "multi", "graders": members, "calculate_output": "a + b"}
    secrets = {f"inline:{name}": {"headers": {"authorization": f"Bearer hunter2-{name}"}, "signing_secret": None} for name in members}
    worker = make_worker(settings)
    submit(worker, grader=TypeAdapter[Any](PinnedGraderSpec).validate_python(raw), secrets=worker.secrets.encrypt(secrets))
    claim = claim_next(worker)
    assert claim is not None
    holding = Holding(worker, claim)
    assert prepare(holding).secrets == secrets
    written = b"".join(path.read_bytes() for path in holding.directory.rglob("*") if path.is_file())
    assert b"inline:b" in written
    assert b"hunter2" not in written
