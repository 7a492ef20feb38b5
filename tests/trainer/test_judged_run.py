"""A whole run graded by a judge behind real HTTP, which echoes the key it was sent wherever it can."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from core.grader_specs import PinnedGraderSpec
from core.run_directory import JOB, REWARDS, End, ResolvedJob, publish_json
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, status
from tests.graders.helpers import base_url, verdict
from tests.trainer.runs import make_run_directory, read_metrics, read_samples
from trainer.config import pass_threshold
from trainer.control import ControlReader, Pulse
from trainer.loop import run_job

KEY = "sk-topsecret/99"
SECRETS: dict[str, dict[str, Any]] = {"inline": {"headers": {"authorization": f"Bearer {KEY}"}, "signing_secret": None}}
PINNED: TypeAdapter[PinnedGraderSpec] = TypeAdapter(PinnedGraderSpec)
JUDGE = {"secret_ref": "inline", "model": "judge-1", "input": [{"role": "user", "content": "{{item.letter}}? {{sample.output_text}}"}]}


def echoing(received: Received) -> Reply:
    """Every seventh call is refused; the others get half the range. Both answers quote the key."""
    key = received.headers["authorization"]
    if int(received.headers["idempotency-key"][:8], 16) % 7 == 0:
        return status(403, f"not with {key}".encode())
    return verdict(5, f"seen {key}")


def test_a_judged_run_keeps_verdicts_and_tokens_and_leaves_no_key_behind(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=2, max_grader_failure_fraction=1.0)
    job = ResolvedJob.model_validate_json((folder / JOB).read_text())
    with FakeEndpoint(echoing) as server:
        spec = PINNED.validate_python({**JUDGE, "type": "score_model", "base_url": base_url(server), "range": [0, 10]})
        publish_json(folder / JOB, job.model_copy(update={"grader": spec, "allowed_private_networks": LOOPBACK}))
        pulse = Pulse(folder)
        outcome = run_job(folder, SECRETS, ControlReader(folder, pulse), pulse)
        pulse.stop()
        calls = len(server.requests)
    assert (outcome.end, outcome.step) == (End.SUCCEEDED, 2)
    assert [line.values["reward_mean"] for line in read_metrics(folder)] == [5.0, 5.0]
    assert {sample.reward for sample in read_samples(folder)} <= {5.0, None}
    grades = [json.loads(line) for line in (folder / REWARDS).read_text().splitlines()]
    assert len(grades) == calls
    assert {grade["reward"] for grade in grades if grade["error"] is None} == {5.0}
    assert {grade["reward"] for grade in grades if grade["error"] == "grader_http_error"} == {None}
    assert all(grade["token_usage"]["judge-1"]["total_tokens"] == 35 for grade in grades if grade["error"] is None)
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"topsecret" in text for text in texts)
    assert any(b"seen **********" in text for text in texts)


@pytest.mark.parametrize(
    ("raw", "threshold"),
    [
        ({"type": "score_model", "range": [1, 5]}, 5.0),
        ({"type": "score_model", "range": [1, 5], "pass_threshold": 4}, 4.0),
        ({"type": "label_model", "labels": ["a"], "passing_labels": ["a"]}, 1.0),
        ({"type": "endpoint", "url": "https://x.example", "grader_version": "inline", "reward_range": [0, 3]}, 3.0),
        ({"type": "endpoint", "url": "https://x.example", "grader_version": "inline", "reward_range": [0, 3], "pass_threshold": 0}, 0.0),
        ({"type": "text_similarity", "input": "", "reference": "", "evaluation_metric": "bleu"}, 1.0),
        ({"type": "text_similarity", "input": "", "reference": "", "evaluation_metric": "bleu", "pass_threshold": 0.5}, 0.5),
        ({"type": "python", "source": "x"}, 1.0),
    ],
)
def test_reports_count_from_the_graders_threshold_else_from_its_best_reward(raw: dict[str, Any], threshold: float) -> None:
    judge = {**JUDGE, "base_url": "https://x.example/v1"} if raw["type"].endswith("_model") else {}
    secret = {"secret_ref": "inline"} if raw["type"] == "endpoint" else {}
    assert pass_threshold(PINNED.validate_python({**judge, **secret, **raw})) == threshold
