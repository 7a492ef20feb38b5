"""A grader goes away in the middle of a step and returns: a pause, and then the run that would have been anyway."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.end_to_end.story import MODEL, TOKEN, SignedGrader, register, submit
from tests.fake_endpoint import Received, Reply
from tests.platform import Platform, run_platform

QUICK = {"HONE_GRADER_PATIENCE_SECONDS": "1", "HONE_GRADER_PROBE_SECONDS": "0.5"}
STEPS = 3
AWAY_FROM = 2
"""The step in whose middle the grader stops to answer."""


class FickleGrader(SignedGrader):
    """While it `is_away`: one more answer in step 2, then none, and none to probes."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = True
        self.seen: list[str] = []
        """The completions of step 2 that it answered, by the id of the request."""

    def answer(self, received: Received) -> Reply:
        reply = super().answer(received)
        metadata = received.json["metadata"]
        if self.is_away and (metadata["step"] >= AWAY_FROM or metadata.get("probe")) and self.seen:
            return Reply(reset=True)
        if metadata["step"] == AWAY_FROM and not metadata.get("probe"):
            self.seen.append(received.headers["webhook-id"])
        return reply


def events_of(platform: Platform, job_id: str) -> list[Any]:
    return list(reversed(list(platform.client().fine_tuning.jobs.list_events(job_id, limit=100))))


def codes_of(platform: Platform, job_id: str) -> list[str]:
    return [event.data["code"] for event in events_of(platform, job_id) if event.data and "code" in event.data]


def status_of(platform: Platform, job_id: str) -> tuple[str, str | None]:
    job = platform.request("GET", f"/v1/fine_tuning/jobs/{job_id}")
    return job["status"], job["pause_reason"]


def register_again(platform: Platform, grader: SignedGrader) -> str:
    created = platform.request("POST", "/v1/graders", {"name": "sure", "url": grader.endpoint.url, "headers": {"authorization": TOKEN}})
    grader.secret = created["signing_secret"]
    return str(created["id"])


def test_grader_that_goes_away_costs_a_pause_and_not_the_run(tmp_path: Path, valkey_url: str) -> None:
    """The worker is free meanwhile: it trains the undisturbed job, to which the other one is compared in the end."""
    fickle, sure = FickleGrader(), SignedGrader()
    options = {"max_steps": STEPS, "eval_interval": STEPS, "checkpoint_interval": STEPS}
    with fickle.endpoint, sure.endpoint, run_platform(tmp_path / "home", broker_url=valkey_url, environment=QUICK) as platform:
        client = platform.client()
        first = submit(client, register(platform, fickle, tmp_path / MODEL), **options).id
        platform.wait("the pause", lambda: status_of(platform, first) == ("paused", "grader_unavailable"), 60)
        second = submit(client, register_again(platform, sure), **options).id
        assert platform.wait_for_end(second).status == "succeeded"
        platform.wait("a probe in vain", lambda: "grader_probed" in codes_of(platform, first), 20)
        assert status_of(platform, first) == ("paused", "grader_unavailable")
        fickle.is_away = False
        assert platform.wait_for_end(first).status == "succeeded"
        codes = codes_of(platform, first)
        assert codes.index("grader_unavailable") < codes.index("grader_probed") < codes.index("grader_available")
        assert len(set(fickle.seen)) == len(fickle.seen) == 4, "what was answered before the pause was asked again"
        command = [sys.executable, "-m", "local.cli", "verify-run", first, second]
        environment = {**os.environ, "HONE_URL": platform.url, "HONE_API_KEY": platform.key}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
        assert f"Weights and optimizers are equal: checkpoint of step {STEPS}" in process.stdout
        assert fickle.refused == sure.refused == [], "a probe came without signature or token"
