"""Every error has the one body and the request's id, whoever raised it: the routes, the router, the middleware, the server itself."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from api import errors
from api.app import create_app
from api.services import get_services
from core.errors import InvalidTransition, LeaseLost, PlatformError, StorageError
from tests.api.platform import Account, Platform, assert_error

JOBS = "/v1/fine_tuning/jobs"


def send(account: Account, body: bytes, path: str = JOBS) -> Any:
    return account.http.post(path, content=body, headers={"authorization": f"Bearer {account.key}", "content-type": "application/json"})


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/files/", "/v1/fine_tuning/jobs/x/y", "/docs"])
def test_unknown_paths(path: str, platform: Platform) -> None:
    message = assert_error(platform.http.get(path), 404, "unknown_url")
    assert path in message


def test_wrong_method_names_the_right_ones(owner: Account) -> None:
    answer = owner.request("PUT", "/v1/files")
    assert_error(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].replace(" ", "").split(",")) >= {"POST"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"model": NaN}',
        b'{"model": "\\u0000"}',
        b'{"model": "\\ud800"}',
        b'{"m\\u0000": 1}',
        b"\xff\xfe",
        b'{"model": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a": ' * 70 + b"1" + b"}" * 70,
    ],
)
def test_what_is_not_json_is_refused(body: bytes, owner: Account) -> None:
    assert_error(send(owner, body), 400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"1", b"null", b"true"])
@pytest.mark.parametrize("path", [JOBS, "/v1/graders", "/v1/models", "/v1/admin/api_keys", "/v1/fine_tuning/alpha/graders/run"])
def test_json_that_is_no_object_is_refused(body: bytes, path: str, owner: Account) -> None:
    assert_error(send(owner, body, path), 400, "invalid_type")


def test_announced_length_over_the_limit_is_refused_unread(owner: Account, platform: Platform) -> None:
    answer = send(owner, b" " * (platform.settings.max_body_bytes + 1))
    assert_error(answer, 413, "request_too_large")


def test_body_without_a_length_is_cut_at_the_limit(owner: Account, platform: Platform) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(platform.settings.max_body_bytes // 1000 + 1):
            yield b" " * 1000

    headers = {"authorization": f"Bearer {owner.key}"}
    assert_error(platform.http.post(JOBS, content=pieces(), headers=headers), 413, "request_too_large")


@pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/models/a%00b", "/v1/files?after=%00", "/v1/fine_tuning/jobs?metadata[a]=%00"])
def test_nul_in_an_address_is_refused(path: str, owner: Account) -> None:
    assert_error(owner.get(path), 400, "invalid_value")


@pytest.mark.parametrize(
    ("path", "param", "code"),
    [
        ("/v1/files?limit=0", "limit", "invalid_value"),
        ("/v1/files?limit=10001", "limit", "invalid_value"),
        ("/v1/files?limit=many", "limit", "invalid_type"),
        ("/v1/files?order=up", "order", "invalid_value"),
        ("/v1/files?after=file-unknown", "after", "invalid_value"),
        (JOBS + "?limit=101", "limit", "invalid_value"),
        (JOBS + "?limit=-1", "limit", "invalid_value"),
        (JOBS + "?after=ftjob-unknown", "after", "invalid_value"),
        (JOBS + "?metadata=x", "metadata", "invalid_value"),
        (JOBS + "?" + "&".join(f"metadata[k{number}]=x" for number in range(17)), "metadata", "invalid_value"),
        ("/v1/graders?after=grader_unknown", "after", "invalid_value"),
        (JOBS + "/{job}/events?after=ftevent-unknown", "after", "invalid_value"),
        (JOBS + "/{job}/events?limit=0", "limit", "invalid_value"),
        (JOBS + "/{job}/checkpoints?after=ftckpt_unknown", "after", "invalid_value"),
        (JOBS + "/{job}/metrics?after=-1", "after", "invalid_value"),
        (JOBS + "/{job}/metrics?after=99999999999999999999", "after", "invalid_value"),
        (JOBS + "/{job}/metrics?max_points=0", "max_points", "invalid_value"),
        (JOBS + "/{job}/samples?after=nonsense", "after", "invalid_value"),
        (JOBS + "/{job}/samples?after=ftsample-7", "after", "invalid_value"),
        (JOBS + "/{job}/samples?min_reward=nan", "min_reward", "invalid_value"),
        (JOBS + "/{job}/samples?phase=test", "phase", "invalid_value"),
    ],
)
def test_bad_query_names_its_parameter(path: str, param: str, code: str, owner: Account) -> None:
    if "{job}" in path:
        path = path.format(job=owner.create_job()["id"])
    assert_error(owner.get(path), 400, code, param)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidTransition("x"), 400),
        (StorageError("x"), 503),
        (LeaseLost("x"), 500),
        (errors.TooManyRequests("x"), 429),
        (PlatformError("x"), 500),
    ],
)
def test_status_follows_the_class_chain(error: PlatformError, status: int) -> None:
    assert errors.status_of(error) == status


def failing_app(platform: Platform, error: Exception) -> TestClient:
    """An API in which every route that needs the services raises `error`."""

    def fail() -> None:
        raise error

    app = create_app(platform.settings)
    app.state.services = platform.http.app.state.services
    app.dependency_overrides[get_services] = fail
    return TestClient(app, raise_server_exceptions=False)


def test_bug_is_answered_without_its_text(platform: Platform) -> None:
    answer = failing_app(platform, ZeroDivisionError("secret detail")).get("/v1/models")
    assert_error(answer, 500, "internal_error")
    assert "secret detail" not in answer.text


def test_own_error_that_should_not_reach_a_client_is_answered_without_its_text(platform: Platform) -> None:
    answer = failing_app(platform, LeaseLost("secret detail")).get("/v1/models")
    assert_error(answer, 500, "internal_error")
    assert "secret detail" not in answer.text


def test_database_that_is_away_is_503_and_retried(platform: Platform) -> None:
    answer = failing_app(platform, OperationalError("SELECT secret", {}, Exception("password"))).get("/readyz")
    assert_error(answer, 503, "service_unavailable")
    assert "secret" not in answer.text
    assert "x-should-retry" not in answer.headers


def test_damage_that_no_retry_heals_says_so(platform: Platform) -> None:
    answer = failing_app(platform, StorageError("chunk 3 is damaged", retryable=False)).get("/readyz")
    assert_error(answer, 503, "storage_error")
    assert answer.headers["x-should-retry"] == "false"


def test_every_answer_has_an_id_of_its_own(owner: Account) -> None:
    ids = {owner.get("/v1/models").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(request_id.startswith("req_") for request_id in ids)


def test_error_body_is_the_documented_one(owner: Account) -> None:
    document = owner.get("/openapi.json").json()
    body = owner.get("/v1/nothing").json()
    schema = document["components"]["schemas"]["ErrorBody"]
    assert set(schema["required"]) == body.keys()
    assert set(document["components"]["schemas"]["ErrorObject"]["required"]) == body["error"].keys()
    assert json.dumps(document).count("HTTPValidationError") == 0
