"""What a grader's author does with the platform: by the unmodified `openai` client, and by the commands that docs/graders.md shows."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from core.run_directory import SAMPLES
from database.leases import claim_job
from database.progress import store_samples
from database.session import open_database
from outbound.signing import generate_secret
from tests.database.rows import sample_line
from tests.end_to_end.story import MODEL, rows
from tests.fake_endpoint import FakeEndpoint, Received, Reply, score, status
from tests.graders.helpers import base_url, completion, verdict
from tests.platform import Platform, run_platform
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
ERROR_KEYS = {
    *("formula_parse_error", "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error", "invalid_variable_error"),
    *("other_error", "python_grader_server_error", "python_grader_server_error_type", "python_grader_runtime_error"),
    *("python_grader_runtime_error_details", "model_grader_server_error", "model_grader_server_error_details"),
    *("model_grader_refusal_error", "model_grader_parse_error"),
}
METADATA_KEYS = {"name", "type", "execution_time", "scores", "token_usage", "sampled_model_name", "errors"}
EXACT = {"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.letter}}", "operation": "eq"}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Platform]:
    with run_platform(tmp_path_factory.mktemp("authors") / "home", broker_url=valkey_url, workers=0) as platform:
        yield platform


def judge(url: str, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Grade {{ sample.output_text }}."}]
    return {"type": "score_model", "base_url": url, "api_key": "sk-hush", "model": "judge-1", "input": messages, **changes}


def program(body: str) -> dict[str, Any]:
    return {"type": "python", "name": "program", "source": f"def grade(sample, item):\n    {body}"}


def test_every_flag_of_the_contract_comes_as_an_answer(platform: Platform) -> None:
    run = platform.client().fine_tuning.alpha.graders.run
    by_text = {"down": status(503), "chatty": completion("well"), "shy": completion(None, refusal="no"), "fine": verdict(0.5)}

    def answer(received: Received) -> Reply:
        messages = str(received.json.get("messages", ""))
        return next((reply for text, reply in by_text.items() if text in messages), status(500))

    with FakeEndpoint(answer) as server:
        url = base_url(server)
        endpoint = {"type": "endpoint", "url": server.url}
        formula = {"type": "multi", "graders": {"a": EXACT}, "calculate_output": "1 / (a - 1)"}
        json_field = EXACT | {"input": "{{sample.output_json.answer}}"}
        cases: list[tuple[dict[str, Any], str, set[str], bool]] = [
            (EXACT, "a", set(), True),
            (json_field, "not JSON", {"sample_parse_error"}, True),
            (json_field, '{"answer": "a"}', set(), True),
            (EXACT | {"reference": "{{item.nothing}}"}, "a", {"invalid_variable_error"}, False),
            (program("return 1 / 0"), "a", {"python_grader_runtime_error"}, False),
            (endpoint, "a", {"unresponsive_reward_error"}, False),
            (formula, "a", {"other_error"}, False),
            (judge(url), "down", {"model_grader_server_error"}, False),
            (judge(url), "chatty", {"model_grader_parse_error"}, False),
            (judge(url), "shy", {"model_grader_refusal_error"}, False),
            (judge(url), "fine", set(), True),
        ]
        for grader, text, flags, has_reward in cases:
            answered: Any = run(grader=grader, model_sample=text, item={"letter": "a"})  # type: ignore[arg-type]
            metadata = answered.to_dict()["metadata"]
            assert metadata.keys() >= METADATA_KEYS
            assert metadata["errors"].keys() == ERROR_KEYS
            assert {name for name, value in metadata["errors"].items() if value is True} == flags, (grader, text)
            assert (answered.reward is not None) == has_reward, (grader, text)
            assert answered.metadata.execution_time > 0
            assert {name for name, value in metadata["errors"].items() if isinstance(value, str)} <= {
                "python_grader_runtime_error_details",
                "model_grader_server_error_details",
            }


def test_malformed_grader_is_a_bad_request_with_its_field(platform: Platform) -> None:
    graders = platform.client().fine_tuning.alpha.graders
    normalised: Any = graders.validate(grader={"type": "multi", "graders": [EXACT], "calculate_output": "exact"})  # type: ignore[arg-type,list-item]
    assert normalised.to_dict()["grader"]["graders"] == {"exact": EXACT}
    for call in (lambda grader: graders.validate(grader=grader), lambda grader: graders.run(grader=grader, model_sample="a")):
        with pytest.raises(openai.BadRequestError) as caught:
            call(EXACT | {"operation": "neq"})
        assert caught.value.param == "grader.operation"


def polled(platform: Platform, report: dict[str, Any]) -> dict[str, Any]:
    path = f"/v1/graders/{report['grader_id']}/reports/{report['id']}"
    platform.wait("report", lambda: platform.request("GET", path)["status"] in ("completed", "failed"), 60)
    found: dict[str, Any] = platform.request("GET", path)
    return found


def graded_job(platform: Platform, grader_id: str) -> str:
    """A job that housekeeping validated, with samples as a trainer would have left them: no worker runs here."""
    client = platform.client()
    file = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": {"type": "endpoint", "grader_id": grader_id}}}
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, method=method).id
    platform.wait("validation", lambda: client.fine_tuning.jobs.retrieve(job).status == "queued", 60)
    samples = [sample_line(1, g, g / 8, prompt_index=g, completion="abcdefgh"[: g + 1]) for g in range(8)]
    samples.append(sample_line(1, 8, None, error="grader_timeout", error_message="No answer within 5 seconds."))
    database = open_database(platform.settings)
    with database.transaction() as session:
        claimed = claim_job(session, worker="w", host="h", device="cpu", gpu_class="any", lease_seconds=600.0)
        assert claimed is not None
        assert claimed.job.id == job
        store_samples(session, job, claimed.token, claimed.attempt, file=SAMPLES, offset=9, lines=samples)
    database.close()
    return job


@pytest.fixture(scope="module")
def model(platform: Platform) -> None:
    platform.request("POST", "/v1/models", {"name": MODEL, "source": {"type": "folder", "path": "/m"}, "digest": "d" * 64})


@pytest.mark.usefixtures("model")
def test_grader_is_tested_shown_with_its_job_and_compared_with_another(platform: Platform) -> None:
    def by_length(received: Received) -> Reply:
        return score(len(received.json["sample"]["output_text"]) / 1e6)

    with FakeEndpoint(by_length) as endpoint:
        grader = platform.request("POST", "/v1/graders", {"name": "length", "url": endpoint.url})["id"]
        report = polled(platform, platform.request("POST", f"/v1/graders/{grader}/test", {}))
        assert (report["status"], report["result"]["num_calls"]) == ("completed", len(endpoint.requests))
        outcomes = {finding["probe"]: finding["outcome"] for finding in report["result"]["findings"]}
        assert outcomes["very_long"] == "warning"
        job = graded_job(platform, grader)
        (shown,) = platform.request("GET", f"/v1/fine_tuning/jobs/{job}")["grader_reports"]
        assert (shown["id"], shown["passed"], shown["summary"]) == (report["id"], True, report["summary"])
        compared = polled(platform, platform.request("POST", f"/v1/graders/{grader}/regrade", {"job_id": job}))
        assert (compared["status"], compared["result"]["spearman"], compared["result"]["num_compared"]) == (
            "completed",
            pytest.approx(1.0),
            8,
        )
        (failed,) = platform.request("GET", f"/v1/fine_tuning/jobs/{job}/samples?status=failed")["data"]
        assert (failed["status"], failed["error"], failed["error_message"]) == ("failed", "grader_timeout", "No answer within 5 seconds.")


@pytest.mark.usefixtures("model")
def test_commands_of_the_page_do_what_it_says(platform: Platform, tmp_path: Path) -> None:
    """Every bash block of docs/graders.md, as it stands there but for the port; `serve` goes on while the later ones run."""
    page = (ROOT / "docs/graders.md").read_text()
    port, secret = free_port(), generate_secret()
    (tmp_path / "grade.py").write_text(
        next(text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def grade(sample" in text)
    )
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}\n')
    (tmp_path / "hone").write_text(f'#!/bin/sh\nexec {sys.executable} -m local.cli "$@"\n')
    (tmp_path / "hone").chmod(0o755)
    grader = platform.request("POST", "/v1/graders", {"name": "page", "url": f"http://127.0.0.1:{port}/"})["id"]
    job = graded_job(platform, grader)
    file = platform.request("GET", f"/v1/fine_tuning/jobs/{job}")["training_file"]
    names = {"HONE_URL": platform.url, "HONE_API_KEY": platform.key, "GRADER_SECRET": secret, "GRADER_ID": grader, "JOB_ID": job}
    environment = {**os.environ, **names, "FILE_ID": file, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    server, ran = None, []
    try:
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
            command = ["bash", "-euc", 'curl() { command curl -sS --fail-with-body "$@"; }\n' + block.replace("9000", str(port))]
            if " serve " in block:
                server = subprocess.Popen(["bash", "-euc", "exec " + command[2].splitlines()[1]], cwd=tmp_path, env=environment)
                wait_for_port(port)
                continue
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            ran.append(done.stdout)
    finally:
        if server is not None:
            server.terminate()
            server.wait(timeout=10)
    assert any("9 of 9 probes passed" in output for output in ran)
    assert any('"kind":"regrade"' in output for output in ran)
    assert any("No answer within 5 seconds." in output for output in ran)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, f"nothing listens on {port}"
        time.sleep(0.1)
