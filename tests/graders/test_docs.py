"""What docs/graders.md shows is run: every spec is accepted, every program grades, the server answers a signed call."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from core.grader_specs import GRADER_TYPES, PinnedGraderSpec
from core.specs import parse_grader
from graders.build import build_grader
from graders.calls import RETRIED_STATUSES, RetryPolicy
from graders.check import check_grader, check_programs
from graders.formula import FUNCTIONS
from graders.grade import Grade, GradeFailure, GradeRequest
from graders.probe import MAX_ROWS, NUM_TIMED, probe_grader
from graders.python_sandbox import PythonGrader
from graders.reply import parse_reply
from outbound.safe_http import NetworkPolicy
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, score
from tests.graders.helpers import SECRET, base_url, endpoint_grader, endpoint_spec, grade, request, verdict

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/graders.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


JSON_BLOCKS: list[dict[str, Any]] = [json.loads(text) for text in blocks("json")]
SPECS = [block for block in JSON_BLOCKS if "type" in block]
PINNED: TypeAdapter[PinnedGraderSpec] = TypeAdapter(PinnedGraderSpec)


def spec_of(kind: str) -> dict[str, Any]:
    (spec,) = [spec for spec in SPECS if spec["type"] == kind]
    return spec


@contextmanager
def program(*command: str, **environment: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}")


class FullMarks:
    async def grade(self, request: GradeRequest) -> Grade:
        return Grade(1.0)

    async def close(self) -> None: ...


def test_the_page_shows_every_kind() -> None:
    assert {spec["type"] for spec in SPECS} == set(GRADER_TYPES)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec["type"]))
def test_grader_of_the_page_is_accepted(spec: dict[str, Any]) -> None:
    parsed = parse_grader(spec)
    check_grader(parsed, NetworkPolicy())
    asyncio.run(check_programs(parsed))


def test_program_of_the_page_grades() -> None:
    (source,) = [text for text in blocks("python") if "def grade(" in text]
    rewards = [grade(PythonGrader(source), request(text)).reward for text in ("so 2 + 2 = 4", "5", "no idea")]
    assert rewards == [1.0, 0.1, 0.0]


def test_text_similarity_of_the_page_grades() -> None:
    spec: Any = parse_grader(spec_of("text_similarity"))
    result = grade(build_grader(spec, {}, NetworkPolicy()), request("a dog ran", item={"summary": "the dog ran home"}))
    assert result.reward == pytest.approx(2 * 2 / (3 + 4))


@pytest.mark.parametrize(
    ("kind", "result", "reward"), [("score_model", 8.5, 8.5), ("label_model", "neutral", 1.0), ("label_model", "rude", 0.0)]
)
def test_judge_of_the_page_grades(kind: str, result: Any, reward: float) -> None:
    with FakeEndpoint([verdict(result)]) as server:
        sent = {**spec_of(kind), "base_url": base_url(server)}
        pinned = PINNED.validate_python({**{name: value for name, value in sent.items() if name != "api_key"}, "secret_ref": "inline"})
        secrets = {"inline": {"headers": {"authorization": "Bearer x"}}}
        graded = grade(build_grader(pinned, secrets, NetworkPolicy(LOOPBACK)), request(item={"question": "2 + 2?", "answer": "4"}))
    assert (graded.reward, graded.error) == (reward, None)


def test_server_of_the_page_is_the_example_grades_signed_calls_and_refuses_others() -> None:
    (shown,) = [text for text in blocks("python") if text.startswith("# fastapi_grader.py")]
    example = (ROOT / "examples/fastapi_grader.py").read_text()
    assert example.endswith(shown.removeprefix("# fastapi_grader.py\n"))
    assert len(example.splitlines()) <= 20
    port = free_port()
    command = ("-m", "uvicorn", "examples.fastapi_grader:app", "--port", str(port), "--log-level", "warning")
    with program(*command, GRADER_SECRET=SECRET):
        wait_for(port)
        url = f"http://127.0.0.1:{port}/"
        assert [grade(endpoint_grader(url), request(text)).reward for text in (" 4", "it is 5")] == [1.0, 0.0]
        refused = grade(endpoint_grader(url, signing_secret=None))
        assert (refused.reward, refused.error) == (None, "grader_http_error")
        assert "HTTP 401" in (refused.error_message or "")


def test_probes_on_the_page_are_the_code_s() -> None:
    section = PAGE.split("## Testing an endpoint")[1].split("\n## ")[0]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    batched = endpoint_spec("http://localhost/").model_copy(update={"format": "batch"})
    report = asyncio.run(probe_grader(FullMarks(), batched))
    assert named == {finding.probe for finding in report.findings}
    assert f"the first {MAX_ROWS} are used" in section
    assert f"{NUM_TIMED} calls one after the other" in section


@pytest.mark.parametrize(
    ("mode", "text", "reward"),
    [
        ("last_integer", "2 + 2 = 4", 1.0),
        ("last_integer", "4 is not 5", 0.0),
        ("last_integer", "no number", 0.0),
        ("exact", " 4\n", 1.0),
        ("exact", "= 4", 0.0),
        ("contains", "it is 42", 1.0),
    ],
)
def test_example_grader(mode: str, text: str, reward: float) -> None:
    port = free_port()
    with program("-m", "examples.endpoint_grader", "--port", str(port), "--mode", mode, GRADER_SECRET=SECRET):
        wait_for(port)
        url = f"http://127.0.0.1:{port}/"
        assert grade(endpoint_grader(url), request(text)).reward == reward
        assert httpx.get(url, timeout=5).status_code == 200
        assert httpx.post(url, content=b"{}", timeout=5).status_code == 401
        other = "whsec_" + "A" * 43 + "="
        assert "HTTP 401" in (grade(endpoint_grader(url, signing_secret=other), request(text)).error_message or "")
        assert "HTTP 400" in (grade(endpoint_grader(url), request(text, item={})).error_message or "")


def test_example_grader_does_not_start_without_its_secret() -> None:
    command = [sys.executable, "-m", "examples.endpoint_grader", "--port", "0"]
    process = subprocess.run(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=20, check=False)
    assert process.returncode == 2
    assert "GRADER_SECRET" in process.stderr


def test_request_of_the_page_is_what_is_sent() -> None:
    (shown,) = [block for block in JSON_BLOCKS if "trace_id" in block]
    with FakeEndpoint([score(1.0)]) as endpoint:
        sent = request(shown["sample"]["output_text"], item=shown["item"], trace_id=shown["trace_id"], metadata=shown["metadata"])
        grade(endpoint_grader(endpoint, grader_version="grader_abc@3"), sent)
    assert endpoint.requests[0].json == shown


def test_replies_of_the_page_are_understood() -> None:
    replies = [block for block in JSON_BLOCKS if "score" in block]
    assert replies
    for reply in replies:
        graded = parse_reply(json.dumps(reply).encode(), None, endpoint_grader("http://localhost/")._redactor)
        assert (graded.reward, graded.sub_scores) == (reply["score"], reply["sub_scores"])


def test_every_error_code_is_on_the_page() -> None:
    table = re.findall(r"^\| `(\w+)` \|", PAGE.split("## What went wrong")[1], re.MULTILINE)
    assert sorted(table) == sorted(GradeFailure)


def test_numbers_on_the_page_are_the_code_s() -> None:
    assert {408, 425, 429, 500} <= RETRIED_STATUSES
    assert RetryPolicy() == RetryPolicy(base_seconds=0.5, cap_seconds=30.0, max_retry_after_seconds=60.0, deadline_seconds=None)
    assert "`min max abs floor ceil exp sqrt log`" in PAGE
    assert list(FUNCTIONS) == ["min", "max", "abs", "floor", "ceil", "exp", "sqrt", "log"]
