"""The unmodified `openai` client against `uvicorn api.app:app`, a process of its own, over loopback. No worker runs here."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from core.settings import Settings
from database.base_models import register_model
from database.progress import add_event
from database.projects import ADMIN_SCOPES, create_api_key, create_project, ensure_first_admin
from database.secrets import ensure_secret_key
from database.session import Database, open_database
from migrations.run import upgrade
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
MIB = 1024 * 1024
MAX_UPLOAD_BYTES = 21 * MIB
MODEL = "tiny/base"
ROWS = b'{"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}\n' * 12
STRING_CHECK: Any = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
ENDPOINT = {"type": "endpoint", "name": "mine", "url": "https://grader.example.com/grade", "headers": {"authorization": "Bearer hush-hush"}}


@dataclass(frozen=True)
class Server:
    base_url: str
    admin_key: str
    database: Database
    log: Path

    def client(self, key: str | None = None, **options: Any) -> OpenAI:
        return OpenAI(base_url=self.base_url, api_key=key or self.admin_key, max_retries=0, timeout=60, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai")
    settings = Settings(home=folder / "home")
    ensure_secret_key(settings)
    upgrade(settings)
    database = open_database(settings)
    with database.transaction() as session:
        key = ensure_first_admin(session)
        register_model(session, name=MODEL, project_id=None, kind="base", source={"type": "folder", "path": "/m"}, digest="d" * 64)
    assert key is not None
    port, log = free_port(), folder / "log"
    environment = {**os.environ, "HONE_HOME": str(settings.home), "HONE_MAX_UPLOAD_BYTES": str(MAX_UPLOAD_BYTES)}
    command = [sys.executable, "-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", log)
        yield Server(f"http://127.0.0.1:{port}/v1", key, database, log)
    finally:
        process.terminate()
        process.wait(timeout=20)
        database.close()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the API did not start: {log.read_text()}")


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.client()


def upload(client: OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def method(grader: dict[str, Any] = STRING_CHECK, **block: Any) -> Any:
    return {"type": "reinforcement", "reinforcement": {"grader": grader, **block}}


def create(client: OpenAI, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"model": MODEL, "training_file": upload(client), "method": method(), **changes}
    return client.fine_tuning.jobs.create(**arguments)


def test_files(client: OpenAI) -> None:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.filename, file.bytes, file.purpose) == ("rows.jsonl", len(ROWS), "fine-tune")
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.content(file.id).read() == ROWS
    named = client.files.create(file=ROWS, purpose="fine-tune")
    assert [item.id for item in client.files.list(limit=1, purpose="fine-tune")][:2] == [named.id, file.id]
    assert client.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_large_file_streams_through(client: OpenAI) -> None:
    content = os.urandom(MIB) * 20
    file = client.files.create(file=("big.bin", content), purpose="user_data")
    assert client.files.content(file.id).read() == content


def test_too_large_file_is_told_apart_from_a_broken_connection(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("big.bin", b"x" * (MAX_UPLOAD_BYTES + MIB)), purpose="user_data")
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


def test_job_is_created_watched_and_cancelled(client: OpenAI, server: Server) -> None:
    hyperparameters = {"n_epochs": 2, "group_size": 4, "kl_coefficient": 0.02}
    job = create(
        client,
        method=method(ENDPOINT, hyperparameters=hyperparameters, algorithm="grpo"),
        seed=42,
        suffix="sum",
        metadata={"team": "x"},
        extra_body={"priority": 2},
    )
    assert (job.status, job.seed, job.metadata, job.organization_id) == ("validating_files", 42, {"team": "x"}, "org-hone")
    assert job.priority == 2
    block = job.to_dict()["method"]["reinforcement"]
    assert block["hyperparameters"]["n_epochs"] == 2
    assert block["hyperparameters"]["group_size"] == 4
    assert block["hyperparameters"]["eval_interval"] == "auto"
    assert block["grader"]["headers"] == {"authorization": "**********"}
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
    for number in range(5):
        with server.database.transaction() as session:
            add_event(session, job.id, level="info", message=f"event {number}")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.message for event in events][:5] == [f"event {number}" for number in (4, 3, 2, 1, 0)]
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.id, cancelled.status) == (job.id, "cancelled")


def test_jobs_are_listed_and_filtered(client: OpenAI) -> None:
    plain, tagged = create(client).id, create(client, metadata={"list me": "a&b=c"}).id
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)][:2] == [tagged, plain]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"list me": "a&b=c"})] == [tagged]
    assert next(iter(client.fine_tuning.jobs.list(extra_query={"metadata": "null"}))).id == plain


def test_strict_client_accepts_every_object(server: Server) -> None:
    """`_strict_response_validation` raises for a missing or ill-typed field."""
    with server.database.transaction() as session:
        _, key = create_api_key(session, create_project(session, "strict").id, "strict", list(ADMIN_SCOPES))
    strict = server.client(key, _strict_response_validation=True)
    file_id = upload(strict)
    job = create(strict, training_file=file_id)
    assert strict.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert strict.files.retrieve(file_id).id == file_id
    assert strict.models.retrieve(MODEL).id == MODEL
    assert len(strict.fine_tuning.jobs.list().data) > 0
    assert len(strict.fine_tuning.jobs.list_events(job.id).data) == 1
    assert strict.fine_tuning.jobs.checkpoints.list(job.id).data == []
    assert len(strict.files.list().data) > 0
    assert len(strict.models.list().data) > 0
    run = strict.fine_tuning.alpha.graders.run(grader=STRING_CHECK, model_sample="4", item={"answer": "4"})
    assert run.reward == 1.0
    assert strict.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_graders_run_and_validate(client: OpenAI) -> None:
    graders = client.fine_tuning.alpha.graders
    failed = graders.run(grader=STRING_CHECK, model_sample="4", item={})
    assert failed.to_dict()["reward"] is None
    assert failed.metadata.errors.invalid_variable_error is True
    multi: Any = {"type": "multi", "graders": {"a": STRING_CHECK}, "calculate_output": "a * 2"}
    assert graders.run(grader=multi, model_sample="4", item={"answer": "4"}).reward == 2.0
    validated = graders.validate(grader=STRING_CHECK)
    assert validated.to_dict() == {"grader": STRING_CHECK}


def test_models_with_slashes(client: OpenAI) -> None:
    assert client.models.retrieve(MODEL).owned_by == "system"
    assert MODEL in [model.id for model in client.models.list()]
    registered = httpx.post(
        f"{client.base_url}models",
        json={"name": "org/to-delete", "source": {"type": "folder", "path": "/m"}},
        headers={"authorization": f"Bearer {client.api_key}"},
        timeout=30,
    )
    assert registered.status_code == 200, registered.text
    assert client.models.delete("org/to-delete").deleted is True


Call = Callable[[OpenAI], Any]


def bad_suffix(client: OpenAI) -> Any:
    return create(client, suffix="no spaces")


def cancelled_twice(client: OpenAI) -> Any:
    job = create(client)
    client.fine_tuning.jobs.cancel(job.id)
    return client.fine_tuning.jobs.cancel(job.id)


def wrong_purpose(client: OpenAI) -> Any:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="user_data")
    return create(client, training_file=file.id)


BAD = openai.BadRequestError
REFUSED: dict[str, tuple[Call, type[openai.APIStatusError], str, str | None]] = {
    "unknown job": (lambda c: c.fine_tuning.jobs.retrieve("ftjob-x"), openai.NotFoundError, "fine_tune_not_found", "fine_tune_id"),
    "unknown file": (lambda c: c.files.retrieve("file-x"), openai.NotFoundError, "not_found", "id"),
    "unknown model": (lambda c: c.models.retrieve("ft:x/y:org::z"), openai.NotFoundError, "model_not_found", "model"),
    "job of an unknown model": (lambda c: create(c, model="nothing"), BAD, "model_not_found", "model"),
    "job of an unknown file": (lambda c: create(c, training_file="file-x"), BAD, "file_not_found", "training_file"),
    "file of another purpose": (wrong_purpose, BAD, "invalid_file_purpose", "training_file"),
    "unknown purpose": (lambda c: c.files.create(file=ROWS, purpose="training"), BAD, "invalid_value", "purpose"),  # type: ignore[arg-type]
    "unknown option": (
        lambda c: create(c, method=method(hyperparameters={"group_sise": 4})),
        BAD,
        "unknown_parameter",
        "method.reinforcement.hyperparameters.group_sise",
    ),
    "wrong type": (
        lambda c: create(c, method=method(hyperparameters={"group_size": "four"})),
        BAD,
        "invalid_type",
        "method.reinforcement.hyperparameters.group_size",
    ),
    "malformed grader": (
        lambda c: create(c, method=method({"type": "string_check", "input": "x"})),
        BAD,
        "missing_required_parameter",
        "method.reinforcement.grader.reference",
    ),
    "malformed grader at validate": (
        lambda c: c.fine_tuning.alpha.graders.validate(grader={"type": "magic"}),  # type: ignore[arg-type]
        BAD,
        "invalid_value",
        "grader.type",
    ),
    "bad suffix": (bad_suffix, BAD, "invalid_value", "suffix"),
    "cancelled twice": (cancelled_twice, BAD, "job_not_cancellable", "status"),
    "limit out of range": (lambda c: c.fine_tuning.jobs.list(limit=101), BAD, "invalid_value", "limit"),
    "unknown cursor": (lambda c: c.fine_tuning.jobs.list(after="ftjob-x"), BAD, "invalid_value", "after"),
    "unknown route": (lambda c: c.vector_stores.list(), openai.NotFoundError, "unknown_url", None),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_request_has_its_exception_code_and_param(kind: str, client: OpenAI) -> None:
    call, exception, code, param = REFUSED[kind]
    with pytest.raises(exception) as caught:
        call(client)
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert caught.value.request_id
    assert caught.value.request_id.startswith("req_")


def test_wrong_key_and_missing_scope(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client("hone-wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    with server.database.transaction() as session:
        _, reader = create_api_key(session, create_project(session, "p").id, "reader", ["models:read"])
    with pytest.raises(openai.PermissionDeniedError) as refused:
        server.client(reader).fine_tuning.jobs.list()
    assert refused.value.code == "insufficient_scope"


def test_bad_request_is_sent_once(server: Server) -> None:
    """With the client's own retries on: a 400 that is retried would be in the log three times."""
    client = OpenAI(base_url=server.base_url, api_key=server.admin_key)
    with pytest.raises(BAD):
        client.fine_tuning.jobs.list(limit=77_777)
    assert server.log.read_text().count("limit=77777") == 1


def test_log_of_the_server_holds_no_secret_and_no_traceback(server: Server) -> None:
    """Last in this file: everything above is in the log."""
    log = server.log.read_text()
    assert "POST /v1/fine_tuning/jobs" in log
    assert "hush-hush" not in log
    assert server.admin_key not in log
    assert "Traceback" not in log
    assert json.dumps(ROWS.decode())[:20] not in log
