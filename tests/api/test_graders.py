"""Registered graders: versions, and secrets that nobody sees twice. `graders/run` and `/validate`: failure is an answer."""

import time
from typing import Any

import pytest
import standardwebhooks
from sqlalchemy.orm import Session

from api.routers import graders
from api.schemas import GraderErrors
from core.grader_specs import EndpointOptions
from database.graders import add_grader_version, get_grader
from database.models import Grader, GraderVersion
from tests.api.platform import GRADER, STRING_CHECK, Account, Platform, assert_error
from tests.fake_endpoint import FakeEndpoint, Received, Reply, score, status

RUN, VALIDATE = "/v1/fine_tuning/alpha/graders/run", "/v1/fine_tuning/alpha/graders/validate"
PYTHON = {"type": "python", "source": "def grade(sample, item):\n    return len(sample['output_text']) / item['wanted']"}
CONTRACT_KEYS = [
    "formula_parse_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
    "invalid_variable_error",
    "other_error",
    "python_grader_server_error",
    "python_grader_server_error_type",
    "python_grader_runtime_error",
    "python_grader_runtime_error_details",
    "model_grader_server_error",
    "model_grader_server_error_details",
    "model_grader_refusal_error",
    "model_grader_parse_error",
]


def raised(errors: dict[str, Any]) -> set[str]:
    """The flags that are set."""
    return {name for name, value in errors.items() if value is True}


def test_grader_is_shown_without_its_secrets(owner: Account, platform: Platform) -> None:
    created = owner.post("/v1/graders", GRADER | {"timeout_seconds": 30, "reward_range": [0, 1]}).json()
    secret = created.pop("signing_secret")
    assert secret.startswith("whsec_")
    assert (created["name"], created["version"], created["url"]) == ("arithmetic", 1, GRADER["url"])
    assert (created["timeout_seconds"], created["reward_range"], created["max_attempts"]) == (30, [0, 1], 5)
    assert created["headers"] == {"authorization": "**********"}
    path = f"/v1/graders/{created['id']}"
    assert owner.get(path).json() == created
    texts = [owner.get(path).text, owner.get("/v1/graders").text, owner.post(path, {"timeout_seconds": 5}).text]
    with platform.database.reading() as session:
        version = session.get(GraderVersion, (created["id"], 1))
    assert version is not None
    for text in (*texts, version.secrets, str(version.options)):
        assert "hush" not in text
        assert secret not in text


def test_update_makes_a_version_with_only_the_named_changes(owner: Account, platform: Platform) -> None:
    created = owner.post("/v1/graders", GRADER | {"rate_limit": 5, "pass_threshold": 0.5}).json()
    path = f"/v1/graders/{created['id']}"
    changed = owner.post(path, {"timeout_seconds": 5, "rate_limit": None, "url": None, "name": "new"}).json()
    assert (changed["version"], changed["name"], changed["url"]) == (2, "new", GRADER["url"])
    assert (changed["timeout_seconds"], changed["rate_limit"], changed["pass_threshold"]) == (5, None, 0.5)
    assert changed["headers"] == {"authorization": "**********"}
    assert owner.post(path, {"headers": {"x-key": "hush"}}).json()["headers"] == {"x-key": "**********"}
    secrets = platform.http.app.state.services.secrets
    with platform.database.reading() as session:
        versions = [session.get(GraderVersion, (created["id"], number)) for number in (1, 2, 3)]
    stored = [secrets.decrypt(version.secrets) for version in versions if version]
    assert [entry["headers"] for entry in stored] == [GRADER["headers"], GRADER["headers"], {"x-key": "hush"}]
    assert {entry["signing_secret"] for entry in stored} == {created["signing_secret"]}


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"url": "ftp://x.example"}, "invalid_value", "url"),
        ({"url": "http://169.254.169.254/latest"}, "address_refused", "url"),
        ({"url": "https://user:pass@example.com/"}, "address_refused", "url"),
        ({"timeout_seconds": 601}, "invalid_value", "timeout_seconds"),
        ({"timeout_second": 60}, "unknown_parameter", "timeout_second"),
        ({"headers": {"webhook-signature": "x"}}, "invalid_value", "headers.webhook-signature"),
        ({"headers": {"x": "a\r\nb: c"}}, "invalid_value", "headers.x"),
        ({"headers": {"x y": "z"}}, "invalid_value", "headers"),
        ({"reward_range": [1, 0]}, "invalid_value", "reward_range"),
        ({"format": "xml"}, "invalid_value", "format"),
        ({"batch_size": 8}, "invalid_value", "batch_size"),
        ({"format": "batch", "batch_size": 0}, "invalid_value", "batch_size"),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_refused_grader_names_its_field_and_writes_nothing(
    update: bool, changes: dict[str, Any], code: str, param: str, owner: Account, platform: Platform
) -> None:
    path = f"/v1/graders/{owner.post('/v1/graders', GRADER).json()['id']}" if update else "/v1/graders"
    before = platform.count_rows()
    assert_error(owner.post(path, changes if update else GRADER | changes), 400, code, param)
    assert platform.count_rows() == before


@pytest.mark.parametrize("value", ["hush\r\nhush", ["hush"], {"hush": "hush"}])
def test_refused_header_value_is_not_repeated(value: Any, owner: Account) -> None:
    inline = {"type": "endpoint", "url": GRADER["url"], "headers": {"x": value}}
    for path, body in (("/v1/graders", GRADER | {"headers": {"x": value}}), (VALIDATE, {"grader": inline})):
        answer = owner.post(path, body)
        assert answer.status_code == 400
        assert "hush" not in answer.text


def test_update_that_another_one_overtook_is_refused(owner: Account, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second writer would take back what the first one changed."""
    created = owner.post("/v1/graders", GRADER).json()
    secrets = platform.http.app.state.services.secrets

    def overtaken(session: Session, project_id: str, grader_id: str) -> tuple[Grader, GraderVersion]:
        read = get_grader(session, project_id, grader_id)
        add_grader_version(session, secrets, project_id, grader_id, options=EndpointOptions(url=GRADER["url"], max_attempts=2))
        return read

    monkeypatch.setattr(graders, "get_grader", overtaken)
    assert_error(owner.post(f"/v1/graders/{created['id']}", {"timeout_seconds": 5}), 400, "conflict", "grader_id")


def test_an_update_is_judged_with_what_the_grader_already_has(owner: Account) -> None:
    created = owner.post("/v1/graders", GRADER | {"format": "batch", "hedge": True}).json()
    assert (created["format"], created["batch_size"], created["hedge"]) == ("batch", None, True)
    path = f"/v1/graders/{created['id']}"
    assert owner.post(path, {"batch_size": 8}).json()["batch_size"] == 8
    single = owner.post(path, {"format": "single"}).json()
    assert (single["format"], single["batch_size"]) == ("single", None)


def test_after_a_rotation_both_secrets_sign_and_only_the_answer_shows_the_new_one(owner: Account, platform: Platform) -> None:
    with FakeEndpoint([score(0.5)]) as endpoint:
        created = owner.post("/v1/graders", GRADER | {"url": endpoint.url}).json()
        path = f"/v1/graders/{created['id']}"
        began = time.time()
        rotated = owner.post(f"{path}/rotate_secret").json()
        run(owner, {"type": "endpoint", "grader_id": created["id"]})
    old, new = created["signing_secret"], rotated.pop("signing_secret")
    assert rotated.pop("previous_secret_expires_at") == pytest.approx(began + 24 * 3600, abs=60)
    (received,) = endpoint.requests
    for secret in (old, new):
        standardwebhooks.Webhook(secret).verify(received.body, received.headers)
    assert old != new
    assert rotated == owner.get(path).json()
    with platform.database.reading() as session:
        version = session.get(GraderVersion, (created["id"], 1))
    assert version is not None
    shown = [owner.get(path).text, owner.get("/v1/graders").text, owner.post(path, {"max_attempts": 2}).text, version.secrets]
    assert not any(secret in text for secret in (old, new) for text in shown)


def test_graders_page_newest_first_without_the_deleted(owner: Account) -> None:
    ids = [owner.post("/v1/graders", GRADER).json()["id"] for _ in range(3)]
    page = owner.get("/v1/graders", limit=2).json()
    assert ([grader["id"] for grader in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    assert [grader["id"] for grader in owner.get("/v1/graders", after=ids[1]).json()["data"]] == [ids[0]]
    assert owner.delete(f"/v1/graders/{ids[2]}").json() == {"id": ids[2], "object": "grader", "deleted": True}
    assert [grader["id"] for grader in owner.get("/v1/graders").json()["data"]] == [ids[1], ids[0]]


def run(owner: Account, grader: Any, **more: Any) -> dict[str, Any]:
    answer = owner.post(RUN, {"grader": grader, "model_sample": "4", **more})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert list(body["metadata"]["errors"]) == CONTRACT_KEYS
    return body


def test_run_has_the_contracts_keys(owner: Account) -> None:
    body = run(owner, STRING_CHECK, item={"answer": "4"})
    assert body["reward"] == 1.0
    assert body["sub_rewards"] == {}
    assert body["model_grader_token_usage_per_model"] == {}
    contract = {"name", "type", "execution_time", "scores", "token_usage", "sampled_model_name", "errors"}
    assert contract <= body["metadata"].keys()
    assert (body["metadata"]["name"], body["metadata"]["type"]) == ("exact", "string_check")
    assert raised(body["metadata"]["errors"]) == set()
    assert list(GraderErrors.model_fields) == CONTRACT_KEYS


def test_run_takes_the_first_apis_reference_answer(owner: Account) -> None:
    grader = STRING_CHECK | {"reference": "{{item.reference_answer}}"}
    assert run(owner, grader, reference_answer=4)["reward"] == 1.0


def test_wrong_answer_is_0_and_a_broken_grader_is_null(owner: Account) -> None:
    assert run(owner, STRING_CHECK, item={"answer": "5"})["reward"] == 0.0
    broken = run(owner, STRING_CHECK, item={})
    assert broken["reward"] is None
    assert raised(broken["metadata"]["errors"]) == {"invalid_variable_error"}
    assert broken["metadata"]["error"]["code"] == "invalid_variable_error"


def test_sample_that_is_no_json_is_flagged_beside_its_reward(owner: Account) -> None:
    """A wrong answer, not a broken grader; and no flag where nobody looks at the JSON."""
    grader = STRING_CHECK | {"input": "{{sample.output_json.sum}}"}
    no_json = run(owner, grader, item={"answer": "4"}, model_sample="4 is it")
    assert (no_json["reward"], raised(no_json["metadata"]["errors"])) == (0.0, {"sample_parse_error"})
    found = run(owner, grader, item={"answer": "4"}, model_sample='{"sum": 4}')
    assert (found["reward"], raised(found["metadata"]["errors"])) == (1.0, set())
    assert raised(run(owner, STRING_CHECK, item={"answer": "4"}, model_sample="4 is it")["metadata"]["errors"]) == set()
    assert found["metadata"]["execution_time"] > 0


def test_run_of_a_multi_grader_shows_its_parts(owner: Account) -> None:
    grader = {"type": "multi", "graders": {"exact": STRING_CHECK, "long": PYTHON}, "calculate_output": "exact + long / 2"}
    body = run(owner, grader, item={"answer": "4", "wanted": 2})
    assert body["sub_rewards"] == {"exact": 1.0, "long": 0.5}
    assert body["reward"] == 1.25


def test_python_failure_is_flagged_with_its_text(owner: Account) -> None:
    body = run(owner, PYTHON, item={"wanted": 0})
    assert body["reward"] is None
    errors = body["metadata"]["errors"]
    assert raised(errors) == {"python_grader_runtime_error"}
    assert "ZeroDivisionError" in errors["python_grader_runtime_error_details"]


def test_python_program_never_runs_in_this_process(owner: Account) -> None:
    """It can neither see nor change what this process holds."""
    source = "import sys\ndef grade(sample, item):\n    sys.modules['api.app'].app = None\n    return 1.0"
    assert run(owner, {"type": "python", "source": source})["reward"] is None


def test_run_asks_a_registered_endpoint_once_and_signed(owner: Account) -> None:
    with FakeEndpoint([status(503), score(0.5)]) as endpoint:
        grader = owner.post("/v1/graders", GRADER | {"url": endpoint.url}).json()
        first = run(owner, {"type": "endpoint", "grader_id": grader["id"]}, item={"answer": "4"})
        second = run(owner, {"type": "endpoint", "grader_id": grader["id"]}, item={"answer": "4"})
    assert (first["reward"], raised(first["metadata"]["errors"])) == (None, {"unresponsive_reward_error"})
    assert second["reward"] == 0.5
    assert len(endpoint.requests) == 2
    request = endpoint.requests[1]
    assert request.json["item"] == {"answer": "4"}
    assert request.json["sample"]["output_text"] == "4"
    assert request.headers["authorization"] == "Bearer hush-hush"
    assert request.headers["webhook-signature"].startswith("v1,")


def test_run_of_an_inline_endpoint_shows_none_of_its_headers(owner: Account) -> None:
    def echo(request: Received) -> Reply:
        return status(400, str(request.headers).encode())

    with FakeEndpoint(echo) as endpoint:
        answer = owner.post(RUN, {"grader": GRADER | {"type": "endpoint", "url": endpoint.url}, "model_sample": "4"})
    assert "hush" not in answer.text
    assert raised(answer.json()["metadata"]["errors"]) != set()


@pytest.mark.parametrize("path", [RUN, VALIDATE])
@pytest.mark.parametrize(
    ("grader", "code", "param"),
    [
        ({"type": "magic"}, "invalid_value", "grader.type"),
        ({}, "invalid_value", "grader.type"),
        (STRING_CHECK | {"operation": "same"}, "invalid_value", "grader.operation"),
        (STRING_CHECK | {"inptu": "x"}, "unknown_parameter", "grader.inptu"),
        (STRING_CHECK | {"input": "{{ nothing }}"}, "invalid_variable_error", "grader.input"),
        ({"type": "endpoint", "grader_id": "grader_unknown"}, "grader_not_found", "grader.grader_id"),
        ({"type": "endpoint", "url": "http://192.168.0.1/x"}, "address_refused", "grader.url"),
        (
            {"type": "multi", "graders": {"a": STRING_CHECK}, "calculate_output": "a + b"},
            "formula_parse_error",
            "grader.calculate_output",
        ),
        (
            {"type": "multi", "graders": {"a": STRING_CHECK | {"operation": "x"}}, "calculate_output": "a"},
            "invalid_value",
            "grader.graders.a.operation",
        ),
    ],
)
def test_malformed_grader_is_400(path: str, grader: dict[str, Any], code: str, param: str, owner: Account) -> None:
    body = {"grader": grader} | ({"model_sample": "4"} if path == RUN else {})
    assert_error(owner.post(path, body), 400, code, param)


def test_validate_gives_the_grader_back_with_its_headers_masked(owner: Account) -> None:
    assert owner.post(VALIDATE, {"grader": STRING_CHECK}).json() == {"grader": STRING_CHECK}
    inline = {"type": "endpoint", "url": GRADER["url"], "headers": GRADER["headers"]}
    shown = owner.post(VALIDATE, {"grader": inline}).json()["grader"]
    assert shown["headers"] == {"authorization": "**********"}
    assert shown["timeout_seconds"] == 60
    as_list = {"type": "multi", "graders": [STRING_CHECK], "calculate_output": "exact"}
    assert owner.post(VALIDATE, {"grader": as_list}).json()["grader"]["graders"] == {"exact": STRING_CHECK}


@pytest.mark.parametrize(
    "source", ["def grade(sample, item)\n    return 1", "x = 1", "def grade(sample, item):\n  return 1\nraise ValueError('no')"]
)
def test_program_that_does_not_load_is_refused_at_every_door(source: str, owner: Account, platform: Platform) -> None:
    grader = {"type": "python", "source": source}
    answer = owner.post(VALIDATE, {"grader": grader})
    assert answer.json()["error"]["param"] == "grader.source"
    request = owner.job_request(grader=grader)
    before = platform.count_rows()
    answer = owner.post("/v1/fine_tuning/jobs", request)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "method.reinforcement.grader.source")
    assert platform.count_rows() == before


def test_program_that_loads_for_ever_is_stopped(owner: Account) -> None:
    answer = owner.post(VALIDATE, {"grader": {"type": "python", "source": "while True:\n    pass"}})
    assert_error(answer, 400, "python_grader_timeout", "grader.source")
