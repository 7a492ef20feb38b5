"""No secret in clear anywhere: a job with every kind of grader that has one, an endpoint and a judge that echo what they were sent.

Every place is searched while the job runs (held at a step) and when it has ended.
"""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from core.folders import folder_digest
from tests.end_to_end.story import MODEL, OPTIONS, rows
from tests.fake_endpoint import FakeEndpoint, Received, Reply, answer, status
from tests.graders.helpers import base_url, verdict
from tests.platform import Platform, run_platform
from tests.secrets.places import Place, files, found, keys, processes, tables
from tests.tiny import build_tiny_model, build_tiny_reward_model

TOKEN = "tok+en/with=odd&chars-5f1c2e77"
SECOND = "second header? yes: 81b0c3d4"
JUDGE_KEY = "sk-judge/9d+0e5a71c2f8b3"
HELD_STEP = 3
PROGRAM = (
    "import statistics\ndef grade(sample, item):\n    return statistics.mean([len(sample['output_text']), 1])"  # only all of Python has it
)


class Echo:
    """An endpoint and a judge that say back what they were told, in every disguise, and fail every fourth time."""

    def __init__(self) -> None:
        self.signing_secret = ""
        self.is_held = True
        self.refused: list[str] = []
        self.kinds: set[str] = set()
        self.endpoint = FakeEndpoint(self.grade)
        self.judge = FakeEndpoint(self.judged)

    def grade(self, received: Received) -> Reply:
        try:
            Webhook(self.signing_secret).verify(received.body, received.headers)
            step = received.json["metadata"]["step"]
        except (WebhookVerificationError, KeyError, ValueError) as error:
            self.refused.append(repr(error))
            return status(401)
        text = echoed(received.headers["authorization"], received.headers["x-second"], self.signing_secret)
        is_held = lambda: self.is_held and step == HELD_STEP  # noqa: E731
        if int(received.headers["idempotency-key"][:8], 16) % 4 == 0:
            self.kinds.add("failed")
            return Reply(text.encode(), status=400, is_held=is_held)
        self.kinds.add("graded")
        return answer({"score": 0.5, "explanation": text, "sub_scores": {text[-60:]: 1.0}}, is_held=is_held)

    def judged(self, received: Received) -> Reply:
        self.kinds.add("judged")
        return verdict(0.5, echoed(received.headers["authorization"]))


def echoed(*values: str) -> str:
    plain = " ".join(values)
    encoded = [base64.b64encode(value.encode()).decode() for value in (*values, f"u:{values[0]}", plain)]
    return " | ".join([plain, *encoded, *(quote(value, safe="") for value in values), repr({"headers": values})])


@pytest.fixture(params=["sqlite and valkey", "postgresql and redis"])
def servers(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(broker, database); no database is SQLite."""
    if request.param == "sqlite and valkey":
        return request.getfixturevalue("valkey_url"), ""
    url: str = request.getfixturevalue("postgres_url")
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True, connect_timeout=5) as connection:
        connection.execute("CREATE DATABASE secrets")
    return request.getfixturevalue("redis_url"), url.removesuffix("/postgres") + "/secrets"


def test_no_secret_is_anywhere_in_clear(servers: tuple[str, str], tmp_path: Path) -> None:
    broker_url, database_url = servers
    echo = Echo()
    with (
        echo.endpoint,
        echo.judge,
        run_platform(
            tmp_path / "home", broker_url=broker_url, database_url=database_url, environment={"HONE_ALLOW_HTTP_GRADERS": "1"}
        ) as up,
    ):
        secrets = {
            "header": TOKEN,
            "second header": SECOND,
            "judge's key": JUDGE_KEY,
            "the server's key": (up.home / "secret_key").read_text().strip(),
            "API key": up.key,
        }
        grader = register(up, echo, tmp_path)
        secrets["signing secret"] = echo.signing_secret.removeprefix("whsec_")
        client = up.client()
        job = submit(client, grader, echo)
        up.wait(
            "the held step",
            lambda: echo.endpoint.num_open > 0 and client.fine_tuning.jobs.list_events(job.id).data != [] and at_step(up, job.id),
            120,
        )

        seen = processes([running.process.pid for running in up.processes.values()])
        commands = b"\n".join(command for _, command, _ in seen)
        assert b"-m\0trainer\0" in commands
        assert b"sandbox_process" in commands
        inner = [entry for entry in seen if b"-m\0trainer\0" in entry[1] or b"sandbox_process" in entry[1] or b"monty" in entry[1]]
        assert found(secrets, ((f"process {pid}", command + b"\n" + environment) for pid, command, environment in inner)) == []
        assert found(secrets, ((f"command line of {pid}", command) for pid, command, _ in seen)) == []
        names = b"".join(environment for *_, environment in inner)
        assert b"HONE_DATABASE_URL" not in names
        assert b"HONE_BROKER_URL" not in names
        assert list((up.home / "runs").glob("*/*/job.json"))
        assert found(secrets, everywhere(up, broker_url, database_url, job.id, grader)) == []

        echo.is_held = False
        ended = up.wait_for_end(job.id)
        assert ended.status == "succeeded", up.logs()
        assert found(secrets, everywhere(up, broker_url, database_url, job.id, grader)) == []
        samples = json.dumps(up.request("GET", f"/v1/fine_tuning/jobs/{job.id}/samples?limit=100"))
        assert "**********" in samples
        assert "grader_http_error" in samples
    assert found(secrets, files(up.home, leave_out=("secret_key",))) == []
    assert echo.kinds == {"failed", "graded", "judged"}
    assert echo.refused == []


def at_step(up: Platform, job_id: str) -> bool:
    """Whether the step before the held one is stored, so that the reports have something to say."""
    points = up.request("GET", f"/v1/fine_tuning/jobs/{job_id}/metrics")["data"]
    return any(point["step"] == HELD_STEP - 1 for point in points)


def register(up: Platform, echo: Echo, folder: Path) -> str:
    for name, build in ((MODEL, build_tiny_model), ("judge", build_tiny_reward_model)):
        build(folder / name)
        source = {"type": "folder", "path": str(folder / name)}
        up.request("POST", "/v1/models", {"name": name, "source": source, "digest": folder_digest(folder / name)})
    headers = {"authorization": f"Bearer {TOKEN}", "x-second": SECOND}
    created = up.request("POST", "/v1/graders", {"name": "echo", "url": echo.endpoint.url, "headers": headers})
    echo.signing_secret = created["signing_secret"]
    return str(created["id"])


def members(grader_id: str, echo: Echo) -> dict[str, Any]:
    messages = [{"role": "user", "content": "{{ sample.output_text }}"}]
    return {
        "echo": {"type": "endpoint", "grader_id": grader_id},
        "judge": {"type": "score_model", "base_url": base_url(echo.judge), "api_key": JUDGE_KEY, "model": "j", "input": messages},
        "program": {"type": "python", "source": PROGRAM},
        "model": {"type": "reward_model", "model": "judge", "input": "x{{ sample.output_text }}"},
    }


def submit(client: Any, grader_id: str, echo: Echo) -> Any:
    file = client.files.create(file=("rows.jsonl", io.BytesIO(rows())), purpose="fine-tune")
    grader = {"type": "multi", "graders": members(grader_id, echo), "calculate_output": "echo + judge + program + model"}
    options = {**OPTIONS, "group_size": 4, "max_grader_failure_fraction": 1.0}
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": options}}
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, method=method, seed=7)


def everywhere(up: Platform, broker_url: str, database_url: str, job_id: str, grader_id: str) -> Iterator[Place]:
    yield from files(up.home, leave_out=("secret_key",))
    yield from tables(up, database_url)
    yield from keys(broker_url)
    job = f"/v1/fine_tuning/jobs/{job_id}"
    listings = [f"{job}/{part}?limit=100" for part in ("events", "checkpoints", "metrics", "samples", "digests")]
    for path in (
        job,
        "/v1/fine_tuning/jobs",
        "/v1/graders",
        f"/v1/graders/{grader_id}",
        "/v1/models",
        "/v1/files",
        "/v1/admin/api_keys",
        *listings,
    ):
        yield path, ask(up, "GET", path)
    for path, body in requests(grader_id):
        yield f"POST {path}", ask(up, "POST", path, body)


def requests(grader_id: str) -> list[tuple[str, Any]]:
    """Calls that are answered with a grader, with a grade, or with an error about a secret."""
    alpha = "/v1/fine_tuning/alpha/graders"
    endpoint = {"type": "endpoint", "url": "http://127.0.0.1:9/grade", "headers": {"authorization": TOKEN, "x-second": SECOND}}
    judge = {
        "type": "score_model",
        "base_url": "http://127.0.0.1:9/v1",
        "api_key": JUDGE_KEY,
        "model": "j",
        "input": [{"role": "user", "content": "x"}],
    }
    wrong = [
        {**endpoint, "headers": {"authorization": f"{TOKEN}\n"}},
        {**endpoint, "headers": {"authorization": [TOKEN]}},
        {**judge, "api_key": f"{JUDGE_KEY}\u00e9"},
        {**judge, "api_key": [JUDGE_KEY]},
        {**judge, "base_url": "ftp://x"},
        {"type": "endpoint", "grader_id": grader_id, "headers": {"authorization": TOKEN}},
    ]
    run = {"model_sample": "x", "item": {}}
    graders = [endpoint, judge, {"type": "endpoint", "grader_id": grader_id}, *wrong]
    calls = [(f"{alpha}/validate", {"grader": grader}) for grader in graders]
    calls += [(f"{alpha}/run", {"grader": grader, **run}) for grader in (endpoint, judge)]
    calls += [("/v1/graders", {"name": "x", "url": "http://127.0.0.1:9/", "headers": {"a b": TOKEN}})]
    return calls


def ask(up: Platform, method: str, path: str, body: Any = None) -> bytes:
    """The answer with its headers, an error like any other."""
    headers = {"authorization": f"Bearer {up.key}", "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(up.url + path, data, headers, method=method), timeout=30) as reply:
            return bytes(reply.headers) + reply.read()
    except urllib.error.HTTPError as error:
        return bytes(error.headers) + error.read()
