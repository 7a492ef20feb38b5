"""What the end-to-end tests share: a tiny model, rows, a signed grader, and a job told with the unmodified openai client."""

import io
import json
from pathlib import Path
from typing import Any

import openai
from standardwebhooks import Webhook, WebhookVerificationError

from core.folders import folder_digest
from tests.fake_endpoint import FakeEndpoint, Received, Reply, score, status
from tests.platform import Platform
from tests.tiny import build_tiny_model

MODEL = "tiny"
TOKEN = "Bearer end-to-end-token"
LETTERS = "abcdefgh"
OPTIONS = {
    "max_steps": 4,
    "batch_size": 2,
    "group_size": 2,
    "max_completion_tokens": 8,
    "eval_interval": 2,
    "checkpoint_interval": 2,
    "resume_point_interval": 1,
    "finetuning": "full",
    "precision": "float32",
    "kl_coefficient": 0.01,
    "learning_rate": 0.001,
}


class SignedGrader:
    """A grader as its owner would write it: it trusts nothing but the signature and its own token."""

    def __init__(self) -> None:
        self.secret = ""
        self.refused: list[str] = []
        self.held_step: int | None = None
        """Rollouts of this step wait for their answer while it is set."""
        self.override: Reply | None = None
        self.endpoint = FakeEndpoint(self.answer)

    def answer(self, received: Received) -> Reply:
        try:
            Webhook(self.secret).verify(received.body, received.headers)
            assert received.headers["authorization"] == TOKEN
            body = received.json
            step = body["metadata"].get("step")
            reward = body["sample"]["output_text"].count(body["item"]["letter"]) / 8
            return self.override or score(reward, is_held=lambda: self.held_step is not None and step == self.held_step)
        except (WebhookVerificationError, AssertionError, KeyError, ValueError) as error:
            self.refused.append(repr(error))
            return status(401)


def rows(count: int = 12) -> bytes:
    each = ({"messages": [{"role": "user", "content": LETTERS[n % 8]}], "letter": LETTERS[n % 8]} for n in range(count))
    return "".join(json.dumps(row) + "\n" for row in each).encode()


def register(platform: Platform, grader: SignedGrader, folder: Path) -> str:
    """The model and the grader, registered by HTTP; -> the grader's id."""
    build_tiny_model(folder, hidden=32)
    source = {"type": "folder", "path": str(folder)}
    platform.request("POST", "/v1/models", {"name": MODEL, "source": source, "digest": folder_digest(folder)})
    created = platform.request("POST", "/v1/graders", {"name": "letters", "url": grader.endpoint.url, "headers": {"authorization": TOKEN}})
    grader.secret = created["signing_secret"]
    return str(created["id"])


def submit(client: openai.OpenAI, grader_id: str, content: bytes | None = None, **options: Any) -> Any:
    """The job as the client got it back."""
    file = client.files.create(file=("rows.jsonl", io.BytesIO(content or rows())), purpose="fine-tune")
    block = {"grader": {"type": "endpoint", "grader_id": grader_id}, "hyperparameters": {**OPTIONS, **options}}
    method: Any = {"type": "reinforcement", "reinforcement": block}
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, method=method, seed=7, suffix="letters")


def read_metrics(platform: Platform, job_id: str) -> list[dict[str, Any]]:
    """Every metric row, page by page as a poller takes them."""
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["seq"] if found else 0
        page = platform.request("GET", f"/v1/fine_tuning/jobs/{job_id}/metrics?after={after}")
        found += page["data"]
        if not page["has_more"]:
            return found
