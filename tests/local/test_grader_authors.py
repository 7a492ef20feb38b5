"""`hone graders serve` and `hone graders test`, as processes: what a grader's author starts, without any part of the platform."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from local import cli
from outbound.signing import generate_secret, sign, verify
from tests.fake_endpoint import FakeEndpoint, Received, Reply, score, status
from tests.graders.helpers import SECRET, endpoint_grader, grade, request

ROOT = Path(__file__).parents[2]
SERVER_ONLY = (
    *("torch", "transformers", "celery", "fastapi", "uvicorn", "sqlalchemy", "redis", "nltk", "rapidfuzz", "pydantic_monty"),
    *("standardwebhooks", "cryptography"),
)
CLIENT_ONLY = f"import sys; sys.modules.update(dict.fromkeys({SERVER_ONLY!r}))"
"""Makes the import of everything that the client's installation lacks fail."""

PROGRAM = """
import helper

def grade(sample, item):
    text = sample["output_text"]
    if text == "raise":
        raise ValueError("no such thing")
    if text == "return":
        return True
    if text == "nan":
        return float("nan")
    if text == "abstain":
        return None
    if text == "explain":
        return {"score": 0.5, "sub_scores": {"length": len(text)}, "explanation": "half right"}
    return helper.same(text, item["answer"])
"""


@contextmanager
def served(folder: Path, source: str = PROGRAM, command: str = "graders") -> Iterator[str]:
    """The URL of `source`, served by the command line with nothing but the client's libraries."""
    (folder / "helper.py").write_text("def same(a, b):\n    return float(a == b)\n")
    (folder / "grade.py").write_text(source)
    arguments = ["hone", command, "serve", str(folder / "grade.py"), "--port", "0"]
    code = f"{CLIENT_ONLY}; from local.cli import app; sys.argv = {arguments!r}; app()"
    environment = {**os.environ, "GRADER_SECRET": SECRET, "PYTHONUNBUFFERED": "1"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "grading on http" in line, (folder / "log").read_text()
        yield line.split()[2]
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("served")) as url:
        yield url


@pytest.mark.parametrize(("text", "reward"), [("4", 1.0), ("5", 0.0)])
def test_function_grades_signed_calls(url: str, text: str, reward: float) -> None:
    assert grade(endpoint_grader(url), request(text)).reward == reward


def test_function_may_abstain_or_explain(url: str) -> None:
    abstained, explained = (grade(endpoint_grader(url), request(text)) for text in ("abstain", "explain"))
    assert (abstained.reward, abstained.abstained, abstained.error) == (None, True, None)
    assert (explained.reward, explained.sub_scores, explained.explanation) == (0.5, {"length": 7.0}, "half right")


@pytest.mark.parametrize(("text", "words"), [("raise", "ValueError: no such thing"), ("return", "finite number"), ("nan", "finite number")])
def test_function_that_fails_is_an_error_with_its_reason_and_never_a_score(url: str, text: str, words: str) -> None:
    failed = grade(endpoint_grader(url, max_attempts=1), request(text))
    assert (failed.reward, failed.error) == (None, "grader_http_error")
    assert "HTTP 500" in (failed.error_message or "")
    assert words in (failed.error_message or "")


@pytest.mark.parametrize("secret", [None, generate_secret()])
def test_call_without_the_right_signature_is_refused(url: str, secret: str | None) -> None:
    refused = grade(endpoint_grader(url, signing_secret=secret), request("4"))
    assert "HTTP 401" in (refused.error_message or "")


def post(url: str, value: Any) -> httpx.Response:
    body = json.dumps(value).encode()
    return httpx.post(url, content=body, headers=sign(SECRET, "msg_1", int(time.time()), body), timeout=10)


def test_batch_is_answered_by_id(url: str) -> None:
    samples = [{"id": name, "sample": {"output_text": text}, "item": {"answer": "4"}} for name, text in (("a", "4"), ("b", "5"))]
    assert post(url, {"samples": samples, "trace_id": "t"}).json() == {"results": [{"score": 1.0, "id": "a"}, {"score": 0.0, "id": "b"}]}


def test_body_that_is_no_call_is_refused(url: str) -> None:
    assert post(url, [1]).status_code == 400
    assert post(url, {"sample": {"output_text": "4"}}).status_code == 500
    assert httpx.post(url, content=iter([b"x"]), timeout=10).status_code == 411


@pytest.mark.parametrize("source", ["x = 1", "def grade(:", "raise RuntimeError('no')"])
def test_program_without_the_function_is_not_served(source: str, tmp_path: Path) -> None:
    (tmp_path / "grade.py").write_text(source)
    result = invoke("grader", "serve", str(tmp_path / "grade.py"), GRADER_SECRET=SECRET)
    assert result.exit_code == 1
    assert "grade" in str(result.exception)


def test_secret_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "grade.py").write_text("def grade(sample, item):\n    return 1.0\n")
    result = invoke("grader", "serve", str(tmp_path / "grade.py"), GRADER_SECRET="whsec_!hush")
    assert result.exit_code == 1
    assert "signing secret" in str(result.exception)
    assert "hush" not in str(result.exception)


def invoke(*arguments: str, typed: str = "", **environment: str) -> Result:
    unset: dict[str, str | None] = {"GRADER_SECRET": None, "COLUMNS": "200"}
    return CliRunner().invoke(cli.commands, list(arguments), input=typed, env={**unset, **environment})


def test_good_grader_passes_and_the_exit_code_says_so(url: str) -> None:
    result = invoke("grader", "test", url, "--reward-range", "0", "1", "--max-concurrency", "4", GRADER_SECRET=SECRET)
    assert result.exit_code == 0, result.output
    assert "9 of 9 probes passed" in result.output
    assert all(probe in result.output for probe in ("schema", "repeatable", "rate", "prompt_echo"))


def test_failed_probe_is_exit_code_1(url: str) -> None:
    result = invoke("graders", "test", url, "--reward-range", "0", "0.5", GRADER_SECRET=SECRET)
    assert result.exit_code == 1
    assert "outside the reward range" in result.output
    unsigned = invoke("graders", "test", url)
    assert unsigned.exit_code == 1
    assert "HTTP 401" in unsigned.output


def test_own_rows_are_used(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "capital?"}], "answer": "Rome"}\n')
    with FakeEndpoint(lambda received: score(float(received.json["sample"]["output_text"] == received.json["item"]["answer"]))) as endpoint:
        result = invoke("graders", "test", endpoint.url, "--rows", str(tmp_path / "rows.jsonl"))
    assert result.exit_code == 0, result.output
    assert {received.json["item"]["answer"] for received in endpoint.requests} == {"Rome"}
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert "Line 1" in str(invoke("graders", "test", "http://localhost:1/", "--rows", str(tmp_path / "rows.jsonl")).exception)


def test_secrets_are_typed_or_read_sent_and_never_shown() -> None:
    def echo(received: Received) -> Reply:
        verify(SECRET, received.headers, received.body)
        return status(400, json.dumps(received.headers).encode())

    with FakeEndpoint(echo) as endpoint:
        options = ["--secret", "--header", "Authorization", "--header", "X-Other-Key"]
        result = invoke(
            "graders", "test", endpoint.url, *options, typed=f"{SECRET}\nhush-other\n", GRADER_HEADER_AUTHORIZATION="Bearer hush-token"
        )
    assert result.exit_code == 1
    sent = endpoint.requests[0].headers
    assert (sent["authorization"], sent["x-other-key"]) == ("Bearer hush-token", "hush-other")
    assert "**********" in result.output
    assert "hush" not in result.output
    assert SECRET not in result.output
    refused = invoke("graders", "test", endpoint.url, "--header", "Authorization: Bearer hush")
    assert refused.exit_code == 1
    assert "hush" not in str(refused.exception) + refused.output


def test_words_of_a_grader_do_not_steer_the_terminal() -> None:
    with FakeEndpoint([status(400, b"[bold]x[/bold] \x1b[2J")]) as endpoint:
        result = invoke("graders", "test", endpoint.url)
    assert "[bold]x[/bold]" in result.output
    assert "\x1b" not in result.output


def test_probes_need_only_the_clients_installation(url: str) -> None:
    asked = {"options": {"url": url, "max_concurrency": 4}, "headers": {}, "signing_secret": SECRET, "rows": []}
    code = f"{CLIENT_ONLY}; from graders.probe_url import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=json.dumps(asked), capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["passed"] is True
