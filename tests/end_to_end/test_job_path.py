"""The whole platform as processes: the unmodified openai client, the real trainer on a tiny model, a grader behind real HTTP."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.story import LETTERS, MODEL, TOKEN, SignedGrader, read_metrics, register, rows, submit
from tests.fake_endpoint import hang
from tests.local.trees import alive_with
from tests.platform import Platform, run_platform


@pytest.fixture(scope="module")
def grader() -> Iterator[SignedGrader]:
    grader = SignedGrader()
    with grader.endpoint:
        yield grader


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Platform]:
    with run_platform(tmp_path_factory.mktemp("platform") / "home", broker_url=valkey_url) as platform:
        yield platform


@pytest.fixture(scope="module")
def grader_id(platform: Platform, grader: SignedGrader, tmp_path_factory: pytest.TempPathFactory) -> str:
    return register(platform, grader, tmp_path_factory.mktemp("model") / MODEL)


@pytest.fixture(scope="module")
def finished(platform: Platform, grader: SignedGrader, grader_id: str) -> Any:
    """A job that went all the way, while a second one was validated."""
    client = platform.client()
    grader.held_step = 1
    job = submit(client, grader_id)
    assert job.status in ("validating_files", "queued", "running")
    platform.wait("the first job's start", lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", 60)
    second = submit(client, grader_id)
    platform.wait("the second job's validation", lambda: client.fine_tuning.jobs.retrieve(second.id).status == "queued", 30)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    grader.held_step = None
    return platform.wait_for_end(job.id)


def test_job_succeeds_and_its_model_can_be_retrieved(platform: Platform, finished: Any) -> None:
    assert (finished.status, finished.error) == ("succeeded", None), platform.logs()
    assert finished.fine_tuned_model.startswith(f"ft:{MODEL}:")
    assert ":letters:" in finished.fine_tuned_model
    assert finished.trained_tokens > 0
    assert finished.finished_at >= finished.created_at
    client = platform.client()
    assert client.models.retrieve(finished.fine_tuned_model).id == finished.fine_tuned_model
    checkpoints = client.fine_tuning.jobs.checkpoints.list(finished.id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [4, 2]
    assert checkpoints[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-4")
    assert checkpoints[0].metrics.step == 4


def test_events_tell_the_whole_way_newest_first_and_page_by_page(platform: Platform, finished: Any) -> None:
    client = platform.client()
    events = list(client.fine_tuning.jobs.list_events(finished.id, limit=3))
    messages = [event.message for event in reversed(events)]
    assert messages[:2] == [f"Created fine-tuning job: {finished.id}", f"Validating training file: {finished.training_file}"]
    wanted = [
        "Files validated, moving job to queued state",
        "No validation file: 1 of 12 training rows are held out for validation",
        "Fine-tuning job started",
        "Checkpoint created at step 2",
        "Checkpoint created at step 4",
        f"New fine-tuned model created: {finished.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert [message for message in messages if message in wanted] == wanted
    assert [event.level for event in events if "held out" in event.message] == ["warn"]
    reported = [event for event in reversed(events) if event.type == "metrics"]
    assert [event.data["step"] for event in reported][-1] == 4
    assert all("train_mean_reward" in event.data for event in reported if event.data["step"] > 0)


def test_every_step_has_its_metrics_and_samples_once(platform: Platform, finished: Any) -> None:
    metrics = read_metrics(platform, finished.id)
    keys = [(point["phase"], point["step"], point["name"]) for point in metrics]
    assert len(set(keys)) == len(keys)
    assert [step for phase, step, name in keys if (phase, name) == ("train", "reward_mean")] == [1, 2, 3, 4]
    assert [step for phase, step, name in keys if (phase, name) == ("valid", "valid_reward_mean")] == [0, 2, 4]
    for step in range(1, 5):
        page = platform.request("GET", f"/v1/fine_tuning/jobs/{finished.id}/samples?step={step}&phase=train&limit=100")
        assert len(page["data"]) == 4
        assert all(sample["grader_version"].endswith("@1") for sample in page["data"])


def test_the_same_request_again_is_the_same_run(platform: Platform, grader_id: str, finished: Any) -> None:
    """Two jobs, two trainer processes, a grader behind HTTP: the command of a user who checks it finds one chain."""
    chain = platform.request("GET", f"/v1/fine_tuning/jobs/{finished.id}/digests")["data"]
    assert [entry["step"] for entry in chain] == [1, 2, 3, 4]
    assert len({entry["digest"] for entry in chain}) == 4
    again = platform.wait_for_end(submit(platform.client(), grader_id).id)
    command = [sys.executable, "-m", "local.cli", "verify-run", finished.id, again.id]
    environment = {**os.environ, "HONE_URL": platform.url, "HONE_API_KEY": platform.key}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.startswith("The same run: every step up to 4")
    assert "Weights and optimizers are equal: checkpoint of step 4" in process.stdout


def test_grader_was_called_with_signatures_and_its_secrets_are_nowhere(platform: Platform, grader: SignedGrader, finished: Any) -> None:
    assert grader.refused == []
    assert {received.json["item"]["letter"] for received in grader.endpoint.requests} <= set(LETTERS)
    client = platform.client()
    shown = "".join(event.model_dump_json() for event in client.fine_tuning.jobs.list_events(finished.id, limit=100))
    shown += client.fine_tuning.jobs.retrieve(finished.id).model_dump_json() + platform.logs(10**9)
    token = TOKEN.removeprefix("Bearer ")
    for secret in (token, grader.secret.removeprefix("whsec_"), platform.key):
        assert secret not in shown
    stored = b"".join(path.read_bytes() for path in platform.home.glob("*.db*"))
    assert token.encode() not in stored
    assert not (platform.home / "runs" / finished.id).exists()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (rows(7), "invalid_n_examples", "Training file has 7 example(s), but must have at least 10 examples"),
        (rows(11) + b"{not json}\n", "invalid_training_file", "Line 12"),
        (rows(11) + b'{"messages": [{"role": "user", "content": " "}]}\n', "invalid_training_file", "Line 12: the prompt is empty"),
    ],
)
def test_job_with_bad_rows_fails_and_says_where(platform: Platform, grader_id: str, content: bytes, code: str, words: str) -> None:
    job = platform.wait_for_end(submit(platform.client(), grader_id, content).id, 30)
    assert (job.status, job.error.code, job.error.param) == ("failed", code, "training_file")
    assert words in job.error.message


def test_prompt_that_is_too_long_fails_the_job_before_its_first_step(platform: Platform, grader_id: str) -> None:
    content = rows(11) + b'{"messages": [{"role": "user", "content": "%s"}], "letter": "a"}\n' % (b"a" * 600)
    job = platform.wait_for_end(submit(platform.client(), grader_id, content * 2).id)
    assert (job.status, job.error.code) == ("failed", "prompt_too_long"), platform.logs()
    assert "Line " in job.error.message
    assert read_metrics(platform, job.id) == []


def test_running_job_whose_grader_hangs_is_cancelled_within_45_seconds(platform: Platform, grader: SignedGrader, grader_id: str) -> None:
    client = platform.client()
    seen = len(grader.endpoint.requests)
    grader.override = hang()
    try:
        job = submit(client, grader_id)
        platform.wait("a call that hangs", lambda: len(grader.endpoint.requests) > seen, 90)
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        platform.wait("the worker's release", lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at is not None, 45)
        assert alive_with(f"runs/{job.id}") == []
    finally:
        grader.override = None
