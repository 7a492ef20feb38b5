"""What a job echoes, what is refused before anything is written, and how a job is watched."""

from copy import deepcopy
from typing import Any

import pytest

from api.views import CONTRACT_HYPERPARAMETERS
from core.lifecycle import Status
from core.options import Options
from core.presets import PRESETS, resolve_options
from core.run_directory import FileEntry, Manifest
from database.jobs import get_job, mark_validated
from database.models import Checkpoint, Event, Job, Metric, Sample
from database.progress import add_event
from tests.api.platform import BASE_MODEL, GRADER, STRING_CHECK, Account, Platform, assert_error

JOBS = "/v1/fine_tuning/jobs"
BLOCK = "method.reinforcement"
HEADERS = {"authorization": "Bearer hush-hush", "x-other": "hush-hush too"}
INLINE = {"type": "endpoint", "url": "https://grader.example.com/grade", "headers": HEADERS}
MASKED = dict.fromkeys(HEADERS, "**********")


def test_fresh_job_echoes_what_was_sent_and_auto_for_the_rest(owner: Account) -> None:
    hyperparameters = {"n_epochs": 2, "group_size": 4, "batch_size": "auto", "learning_rate": 1e-5}
    request = owner.job_request(seed=7, suffix="my.suffix", metadata={"team": "x"}, priority=3)
    request["method"]["reinforcement"] |= {"algorithm": "ppo", "hyperparameters": hyperparameters}
    job = owner.post(JOBS, request).json()
    assert job["object"] == "fine_tuning.job"
    assert job["status"] == "validating_files"
    for name in ("model", "training_file", "seed", "metadata", "priority"):
        assert job[name] == request[name]
    assert job["user_provided_suffix"] == "my.suffix"
    block = job["method"]["reinforcement"]
    assert block["grader"] == STRING_CHECK
    assert block["algorithm"] == "ppo"
    auto = dict.fromkeys(CONTRACT_HYPERPARAMETERS, "auto") | {"reasoning_effort": "default"}
    assert block["hyperparameters"] == auto | {"n_epochs": 2, "group_size": 4, "learning_rate": 1e-5}
    expected = resolve_options("ppo", {"n_epochs": 2, "group_size": 4, "learning_rate": 1e-5})
    assert Options.model_validate(job["options"]) == expected


@pytest.mark.parametrize("algorithm", sorted(PRESETS))
def test_job_shows_every_effective_option_of_its_preset(algorithm: str, owner: Account) -> None:
    """Only the algorithm is given; nothing that the trainer goes by is left to be guessed."""
    request = owner.job_request()
    request["method"]["reinforcement"] |= {"algorithm": algorithm}
    created = owner.post(JOBS, request).json()
    shown = owner.get(f"{JOBS}/{created['id']}").json()
    assert shown["method"]["reinforcement"]["algorithm"] == algorithm
    assert shown["options"] == created["options"]
    assert shown["options"].keys() == Options.model_fields.keys()
    assert shown["options"].items() >= PRESETS[algorithm].items()
    assert (shown["options"]["group_size"], shown["options"]["learning_rate"]) == (1 if algorithm == "ppo" else 8, 2e-5)
    assert shown["options"]["value_learning_rate"] == (2e-4 if algorithm == "ppo" else None)


def test_fields_that_clients_choke_on_when_null_are_not(owner: Account) -> None:
    job = owner.create_job()
    assert (job["organization_id"], job["result_files"], job["hyperparameters"], job["error"]) == ("org-hone", [], {}, None)
    assert isinstance(job["seed"], int)
    for name in ("fine_tuned_model", "finished_at", "estimated_finish", "validation_file", "integrations", "metadata", "trained_tokens"):
        assert job[name] is None
    assert owner.create_job()["seed"] != job["seed"]


def test_validated_job_shows_the_values_that_auto_became(owner: Account, platform: Platform) -> None:
    job_id = owner.create_job()["id"]
    with platform.database.transaction() as session:
        mark_validated(session, job_id, num_training_rows=12, num_validation_rows=2, validation_blob=None, total_steps=2)
    job = owner.get(f"{JOBS}/{job_id}").json()
    assert (job["status"], job["total_steps"]) == ("queued", 2)
    shown = job["method"]["reinforcement"]["hyperparameters"]
    assert (shown["n_epochs"], shown["batch_size"], shown["eval_interval"]) == (
        job["options"]["n_epochs"],
        job["options"]["batch_size"],
        "auto",
    )


def test_job_pins_what_it_names(owner: Account, platform: Platform) -> None:
    """Deleting the files, the grader and updating it changes nothing in the job."""
    grader = owner.post("/v1/graders", GRADER).json()
    validation = owner.upload()
    job = owner.create_job(grader={"type": "endpoint", "grader_id": grader["id"]}, validation_file=validation)
    assert owner.post(f"/v1/graders/{grader['id']}", {"timeout_seconds": 5}).json()["version"] == 2
    for path in (f"files/{validation}", f"files/{job['training_file']}", f"graders/{grader['id']}"):
        assert owner.delete(f"/v1/{path}").status_code == 200
    with platform.database.reading() as session:
        row = get_job(session, owner.project_id, job["id"])
    assert row.grader["secret_ref"] == row.grader["grader_version"] == f"{grader['id']}@1"
    assert row.grader["timeout_seconds"] == 60
    assert (row.model_digest, row.secrets) == ("d" * 64, None)
    assert row.training_blob
    assert row.validation_blob not in (None, row.training_blob)
    assert owner.get(f"{JOBS}/{job['id']}").json()["method"]["reinforcement"]["grader"]["grader_id"] == grader["id"]


@pytest.mark.parametrize(
    "grader",
    [
        INLINE,
        {"type": "multi", "graders": {"a": INLINE, "headers": STRING_CHECK}, "calculate_output": "a + headers"},
        {"type": "multi", "graders": [INLINE | {"name": "a"}], "calculate_output": "a"},
        {"type": "multi", "graders": INLINE | {"name": "a"}, "calculate_output": "a"},
    ],
)
def test_headers_given_inline_are_masked_and_stored_encrypted(grader: dict[str, Any], owner: Account, platform: Platform) -> None:
    job = owner.create_job(grader=deepcopy(grader))
    texts = [owner.get(path).text for path in (JOBS, f"{JOBS}/{job['id']}", f"{JOBS}/{job['id']}/events")]
    with platform.database.reading() as session:
        row = get_job(session, owner.project_id, job["id"])
    columns = {column.name: getattr(row, column.name) for column in Job.__table__.columns}
    assert all("hush" not in text for text in (*texts, str(columns)))
    assert str(MASKED["x-other"]) in texts[1]
    echoed = job["method"]["reinforcement"]["grader"]
    assert echoed.get("headers", MASKED) == MASKED
    if "a" in grader.get("graders", {}):
        assert echoed["graders"] == {"a": INLINE | {"headers": MASKED}, "headers": STRING_CHECK}
    assert row.secrets is not None
    secrets = platform.http.app.state.services.secrets.decrypt(row.secrets)
    pinned = row.grader if grader["type"] == "endpoint" else row.grader["graders"]["a"]
    assert secrets[pinned["secret_ref"]] == {"headers": HEADERS, "signing_secret": None}
    assert pinned["grader_version"] == "inline"


def changed(request: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`request` with the field at `path` set."""
    target: Any = request
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    return request


REFUSED: list[tuple[str, Any, str, str]] = [
    ("model", "unknown", "model_not_found", "model"),
    ("model", 3, "invalid_type", "model"),
    ("training_file", "file-unknown", "file_not_found", "training_file"),
    ("training_file", None, "invalid_type", "training_file"),
    ("validation_file", "file-unknown", "file_not_found", "validation_file"),
    ("modle", "x", "unknown_parameter", "modle"),
    ("suffix", "a b", "invalid_value", "suffix"),
    ("suffix", ".hidden", "invalid_value", "suffix"),
    ("suffix", "x" * 65, "invalid_value", "suffix"),
    ("seed", -1, "invalid_value", "seed"),
    ("seed", 2**31, "invalid_value", "seed"),
    ("seed", "7", "invalid_type", "seed"),
    ("priority", 11, "invalid_value", "priority"),
    ("metadata", {"a": 1}, "invalid_type", "metadata.a"),
    ("metadata", {"a": "x" * 513}, "invalid_value", "metadata.a"),
    ("method.type", "supervised", "invalid_value", "method.type"),
    (f"{BLOCK}.algorithm", "grop", "invalid_value", f"{BLOCK}.algorithm"),
    (f"{BLOCK}.hyperparameters", {"learning_rat": 1}, "unknown_parameter", f"{BLOCK}.hyperparameters.learning_rat"),
    (f"{BLOCK}.hyperparameters", {"n_epochs": 51}, "invalid_value", f"{BLOCK}.hyperparameters.n_epochs"),
    (f"{BLOCK}.hyperparameters", {"value_model": "separate"}, "incompatible_options", f"{BLOCK}.hyperparameters.value_model"),
    (f"{BLOCK}.response_format", {"type": "xml"}, "invalid_value", f"{BLOCK}.response_format.type"),
    (f"{BLOCK}.response_format", {"type": "json_schema"}, "missing_required_parameter", f"{BLOCK}.response_format.json_schema.schema"),
    (f"{BLOCK}.grader", {"type": "magic"}, "invalid_value", f"{BLOCK}.grader.type"),
    (f"{BLOCK}.grader", "exact", "invalid_type", f"{BLOCK}.grader"),
    (f"{BLOCK}.grader", STRING_CHECK | {"operation": "neq"}, "invalid_value", f"{BLOCK}.grader.operation"),
    (f"{BLOCK}.grader", STRING_CHECK | {"input": "{{row.x}}"}, "invalid_variable_error", f"{BLOCK}.grader.input"),
    (f"{BLOCK}.grader", STRING_CHECK | {"input": "{{sample.output_json}}"}, "invalid_variable_error", f"{BLOCK}.grader.input"),
    (f"{BLOCK}.grader", INLINE | {"url": "http://10.0.0.1/x"}, "address_refused", f"{BLOCK}.grader.url"),
    (f"{BLOCK}.grader", INLINE | {"url": "https://user:pass@example.com/"}, "address_refused", f"{BLOCK}.grader.url"),
    (f"{BLOCK}.grader", INLINE | {"headers": {"host": "x"}}, "invalid_value", f"{BLOCK}.grader.headers.host"),
    (f"{BLOCK}.grader", {"type": "endpoint", "grader_id": "grader_unknown"}, "grader_not_found", f"{BLOCK}.grader.grader_id"),
    (
        f"{BLOCK}.grader",
        {"type": "multi", "graders": {"a": STRING_CHECK}, "calculate_output": "a +"},
        "formula_parse_error",
        f"{BLOCK}.grader.calculate_output",
    ),
]


@pytest.mark.parametrize(("path", "value", "code", "param"), REFUSED, ids=[f"{path}={value}"[:60] for path, value, *_ in REFUSED])
def test_refused_request_names_its_field_and_writes_nothing(
    path: str, value: Any, code: str, param: str, owner: Account, platform: Platform
) -> None:
    request = changed(owner.job_request(), path, value)
    before = platform.count_rows()
    assert_error(owner.post(JOBS, request), 400, code, param)
    assert platform.count_rows() == before


def test_unknown_field_is_told_the_nearest_known_one(owner: Account) -> None:
    request = changed(owner.job_request(), f"{BLOCK}.hyperparameters", {"learning_rat": 1})
    assert "'learning_rate'" in owner.post(JOBS, request).json()["error"]["message"]


@pytest.mark.parametrize("missing", ["model", "training_file", "method"])
def test_missing_field_is_named(missing: str, owner: Account) -> None:
    request = owner.job_request()
    del request[missing]
    assert_error(owner.post(JOBS, request), 400, "missing_required_parameter", missing)


def test_file_of_another_purpose_or_project_is_refused(owner: Account, stranger: Account) -> None:
    data = owner.upload(purpose="user_data")
    assert_error(owner.post(JOBS, owner.job_request(training_file=data)), 400, "invalid_file_purpose", "training_file")
    assert_error(owner.post(JOBS, owner.job_request(training_file=stranger.upload())), 400, "file_not_found", "training_file")


def test_grader_of_another_project_is_refused(owner: Account, stranger: Account) -> None:
    grader = {"type": "endpoint", "grader_id": stranger.post("/v1/graders", GRADER).json()["id"]}
    answer = owner.post(JOBS, owner.job_request(grader=grader))
    assert_error(answer, 400, "grader_not_found", f"{BLOCK}.grader.grader_id")


def test_fine_tuned_model_of_another_project_is_refused(owner: Account, stranger: Account, platform: Platform) -> None:
    assert_error(owner.post(JOBS, owner.job_request(model=platform.fine_tuned_model(stranger))), 400, "model_not_found", "model")
    assert owner.create_job(model=platform.fine_tuned_model(owner))["model"] != BASE_MODEL


def test_cancel_is_at_once_and_only_once(owner: Account) -> None:
    job_id = owner.create_job()["id"]
    cancelled = owner.post(f"{JOBS}/{job_id}/cancel").json()
    assert (cancelled["id"], cancelled["status"]) == (job_id, "cancelled")
    assert isinstance(cancelled["finished_at"], int)
    assert_error(owner.post(f"{JOBS}/{job_id}/cancel"), 400, "job_not_cancellable", "status")


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED])
def test_ended_job_cannot_be_cancelled(status: Status, owner: Account, platform: Platform) -> None:
    job_id = owner.create_job()["id"]
    with platform.database.transaction() as session:
        row = session.get(Job, job_id)
        assert row is not None
        row.status = status
        row.error_code, row.error_message, row.error_param = "invalid_n_examples", "Too few.", "training_file"
    assert_error(owner.post(f"{JOBS}/{job_id}/cancel"), 400, "job_not_cancellable", "status")
    error = {"code": "invalid_n_examples", "message": "Too few.", "param": "training_file"}
    assert owner.get(f"{JOBS}/{job_id}").json()["error"] == error


def test_unknown_job_has_the_contracts_shape(owner: Account) -> None:
    assert assert_error(owner.get(f"{JOBS}/ftjob-x"), 404, "fine_tune_not_found", "fine_tune_id") == "Could not find fine tune: ftjob-x"


def test_jobs_page_newest_first_and_filter_by_metadata(owner: Account) -> None:
    plain, tagged, both = (owner.create_job(metadata=metadata)["id"] for metadata in (None, {"a": "1"}, {"a": "1", "b": "2"}))
    first = owner.get(JOBS, limit=2).json()
    assert ([job["id"] for job in first["data"]], first["has_more"]) == ([both, tagged], True)
    rest = owner.get(JOBS, limit=2, after=tagged).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([plain], False)

    def ids(query: str) -> list[str]:
        return [job["id"] for job in owner.get(f"{JOBS}?{query}").json()["data"]]

    assert ids("metadata%5Ba%5D=1") == [both, tagged]
    assert ids("metadata[a]=1&metadata[b]=2") == [both]
    assert ids("metadata[a]=2") == []
    assert ids("metadata=null") == [plain]


def test_events_page_newest_first(owner: Account, platform: Platform) -> None:
    job_id = owner.create_job()["id"]
    for number in range(4):
        with platform.database.transaction() as session:
            add_event(session, job_id, level="info", message=f"event {number}", data={"number": number})
    seen, after = [], None
    while True:
        page = owner.get(f"{JOBS}/{job_id}/events", limit=2, **({"after": after} if after else {})).json()
        seen += page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert [event["message"] for event in seen] == [*(f"event {number}" for number in (3, 2, 1, 0)), f"Created fine-tuning job: {job_id}"]
    assert seen[0]["data"] == {"number": 3}
    assert seen[0]["object"] == "fine_tuning.job.event"
    assert all(event["id"].startswith("ftevent-") for event in seen)


def test_job_list_events_of_one_job_only(owner: Account, platform: Platform) -> None:
    first, second = owner.create_job()["id"], owner.create_job()["id"]
    other = owner.get(f"{JOBS}/{second}/events").json()["data"][0]["id"]
    assert_error(owner.get(f"{JOBS}/{first}/events", after=other), 400, "invalid_value", "after")


@pytest.fixture
def trained(owner: Account, platform: Platform) -> str:
    """A job with metrics, samples and checkpoints of three steps, as its relay would have stored them."""
    job_id: str = owner.create_job()["id"]
    with platform.database.transaction() as session:
        for step in (1, 2, 3):
            for index, name in enumerate(("reward_mean", "loss")):
                seq = 10 * step + index
                value = None if (step, name) == (3, "loss") else step / 10
                session.add(Metric(job_id=job_id, step=step, phase="train", name=name, value=value, attempt=1, seq=seq))
            metrics = {"reward_mean": step / 10, "valid_reward_mean": step / 5}
            manifest = Manifest(kind="checkpoint", step=step, files=[FileEntry(name="x", bytes=1, sha256="0")]).model_dump()
            name = f"{job_id}:ckpt-step-{step}"
            checkpoint = Checkpoint(id=f"ckpt_{job_id}_{step}", job_id=job_id, step=step, name=name, metrics=metrics, created_at=1.0)
            checkpoint.manifest = manifest
            session.add(checkpoint)
            session.add(sample(job_id, step, reward=None if step == 2 else step / 10))
    return job_id


def sample(job_id: str, step: int, reward: float | None) -> Sample:
    return Sample(
        job_id=job_id,
        step=step,
        phase="train",
        prompt_index=0,
        g=0,
        prompt="2+2?",
        completion="<script>4</script>",
        reward=reward,
        sub_scores={"format": 1.0},
        explanation=None,
        advantage=0.5,
        finish_reason="stop",
        num_tokens=3,
        grader_version="inline",
        attempts=1,
        latency_seconds=0.1,
        error="grader_timeout" if reward is None else None,
        seq=100 + step,
    )


def test_metrics_come_in_order_and_are_polled_by_number(trained: str, owner: Account) -> None:
    path = f"{JOBS}/{trained}/metrics"
    whole = owner.get(path).json()
    assert [(point["step"], point["name"], point["value"]) for point in whole["data"]] == [
        (1, "reward_mean", 0.1),
        (1, "loss", 0.1),
        (2, "reward_mean", 0.2),
        (2, "loss", 0.2),
        (3, "reward_mean", 0.3),
        (3, "loss", None),
    ]
    assert (whole["has_more"], whole["last_seq"]) == (False, 31)
    assert [point["step"] for point in owner.get(path, after=21).json()["data"]] == [3, 3]
    assert owner.get(path, after=31).json() == {"object": "list", "data": [], "has_more": False, "last_seq": 31}
    assert {point["name"] for point in owner.get(path, names="loss,unknown").json()["data"]} == {"loss"}
    assert [point["step"] for point in owner.get(path, names="loss", max_points=1).json()["data"]] == [3]


def test_samples_show_a_missing_grade_as_null_and_page_by_id(trained: str, owner: Account) -> None:
    path = f"{JOBS}/{trained}/samples"
    whole = owner.get(path).json()["data"]
    assert [(item["step"], item["reward"], item["error"]) for item in whole] == [
        (1, 0.1, None),
        (2, None, "grader_timeout"),
        (3, 0.3, None),
    ]
    assert whole[0]["completion"] == "<script>4</script>"
    assert [item["reward"] for item in owner.get(path, order="-reward").json()["data"]] == [0.3, 0.1, None]
    assert [item["step"] for item in owner.get(path, min_reward=0.2).json()["data"]] == [3]
    assert [item["step"] for item in owner.get(path, step=2).json()["data"]] == [2]
    first = owner.get(path, limit=1, order="reward").json()
    assert first["has_more"] is True
    assert [item["reward"] for item in owner.get(path, order="reward", after=first["last_id"]).json()["data"]] == [0.3, None]


def test_checkpoints_page_newest_first_with_the_contracts_metric_names(trained: str, owner: Account) -> None:
    path = f"{JOBS}/{trained}/checkpoints"
    page = owner.get(path, limit=2).json()
    assert [item["step_number"] for item in page["data"]] == [3, 2]
    assert page["has_more"] is True
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][1]["id"])
    newest = page["data"][0]
    assert newest["object"] == "fine_tuning.job.checkpoint"
    assert newest["fine_tuning_job_id"] == trained
    assert newest["fine_tuned_model_checkpoint"].endswith(":ckpt-step-3")
    assert newest["metrics"]["step"] == 3
    assert newest["metrics"]["train_mean_reward"] == newest["metrics"]["train_reward_mean"] == 0.3
    assert newest["metrics"]["full_valid_mean_reward"] == 0.6
    assert [item["step_number"] for item in owner.get(path, after=page["last_id"]).json()["data"]] == [1]


def test_first_event_names_the_job(owner: Account, platform: Platform) -> None:
    """Clients list events right after create."""
    job_id = owner.create_job()["id"]
    with platform.database.reading() as session:
        assert session.query(Event).filter_by(job_id=job_id).count() == 1
    (event,) = owner.get(f"{JOBS}/{job_id}/events").json()["data"]
    assert (event["level"], event["type"], event["message"]) == ("info", "message", f"Created fine-tuning job: {job_id}")
