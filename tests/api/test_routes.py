"""The triad anonymous / other project / owner over every route. The routes come from the OpenAPI document: one without a row here fails."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest

from api.app import create_app
from database.projects import ADMIN_SCOPES
from tests.api.platform import GRADER, ROW, STRING_CHECK, Account, Platform, assert_error

Body = dict[str, Any]
PUBLIC = {("GET", "/healthz"), ("GET", "/readyz")}


@dataclass(frozen=True)
class Row:
    """How a route is called by the owner, and what keeps others out."""

    scope: str
    make: Callable[[Platform, Account], str] | None = None
    """Makes the object that the path names; another project gets 404 for it. None: the route has no object."""

    body: Callable[[Account], Body] | None = None
    code: str = "not_found"
    param: str | None = None
    also: tuple[str, ...] = ()
    """Scopes that are needed beside `scope`."""


def make_file(platform: Platform, account: Account) -> str:
    return account.upload()


def make_job(platform: Platform, account: Account) -> str:
    return str(account.create_job()["id"])


def make_grader(platform: Platform, account: Account) -> str:
    return str(account.post("/v1/graders", GRADER).json()["id"])


def make_report(platform: Platform, account: Account) -> str:
    """The ids of a grader and of a report about it, which stand in the path in this order."""
    grader_id = make_grader(platform, account)
    return f"{grader_id} {account.post(f'/v1/graders/{grader_id}/test').json()['id']}"


def make_key(platform: Platform, account: Account) -> str:
    return str(account.post("/v1/admin/api_keys", {"name": "k", "scopes": ["jobs:read"]}).json()["id"])


def make_model(platform: Platform, account: Account) -> str:
    return platform.fine_tuned_model(account)


JOB: dict[str, Any] = {"make": make_job, "code": "fine_tune_not_found", "param": "fine_tune_id"}
FILE: dict[str, Any] = {"make": make_file, "param": "id"}
REGISTERED: dict[str, Any] = {"make": make_grader, "param": "grader_id"}
MODEL: dict[str, Any] = {"make": make_model, "code": "model_not_found", "param": "model"}

ROWS: dict[tuple[str, str], Row] = {
    ("POST", "/v1/files"): Row("jobs:write"),
    ("GET", "/v1/files"): Row("jobs:read"),
    ("GET", "/v1/files/{file_id}"): Row("jobs:read", **FILE),
    ("GET", "/v1/files/{file_id}/content"): Row("jobs:read", **FILE),
    ("DELETE", "/v1/files/{file_id}"): Row("jobs:write", **FILE),
    ("POST", "/v1/fine_tuning/jobs"): Row("jobs:write", body=lambda account: account.job_request()),
    ("GET", "/v1/fine_tuning/jobs"): Row("jobs:read"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): Row("jobs:read", **JOB),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): Row("jobs:write", **JOB),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Row("jobs:read", **JOB),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Row("jobs:read", **JOB),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/metrics"): Row("jobs:read", **JOB),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/digests"): Row("jobs:read", **JOB),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/samples"): Row("jobs:read", **JOB),
    ("POST", "/v1/fine_tuning/alpha/graders/run"): Row(
        "graders:write", body=lambda account: {"grader": STRING_CHECK, "model_sample": "4", "item": {"answer": "4"}}
    ),
    ("POST", "/v1/fine_tuning/alpha/graders/validate"): Row("graders:write", body=lambda account: {"grader": STRING_CHECK}),
    ("POST", "/v1/graders"): Row("graders:write", body=lambda account: GRADER),
    ("GET", "/v1/graders"): Row("jobs:read"),
    ("GET", "/v1/graders/{grader_id}"): Row("jobs:read", **REGISTERED),
    ("POST", "/v1/graders/{grader_id}"): Row("graders:write", body=lambda account: {"timeout_seconds": 5}, **REGISTERED),
    ("POST", "/v1/graders/{grader_id}/rotate_secret"): Row("graders:write", **REGISTERED),
    ("DELETE", "/v1/graders/{grader_id}"): Row("graders:write", **REGISTERED),
    ("POST", "/v1/graders/{grader_id}/test"): Row("graders:write", **REGISTERED),
    ("POST", "/v1/graders/{grader_id}/regrade"): Row(
        "graders:write", body=lambda account: {"job_id": account.create_job()["id"]}, also=("jobs:read",), **REGISTERED
    ),
    ("GET", "/v1/graders/{grader_id}/reports"): Row("jobs:read", **REGISTERED),
    ("GET", "/v1/graders/{grader_id}/reports/{report_id}"): Row("jobs:read", make=make_report, param="report_id"),
    ("POST", "/v1/models"): Row(
        "admin", body=lambda account: {"name": f"base-{account.project_id}", "source": {"type": "folder", "path": "/m"}}
    ),
    ("GET", "/v1/models"): Row("models:read"),
    ("GET", "/v1/models/{model}"): Row("models:read", **MODEL),
    ("DELETE", "/v1/models/{model}"): Row("jobs:write", **MODEL),
    ("POST", "/v1/admin/api_keys"): Row("admin", body=lambda account: {"name": "k", "scopes": ["jobs:read"]}),
    ("GET", "/v1/admin/api_keys"): Row("admin"),
    ("DELETE", "/v1/admin/api_keys/{key_id}"): Row("admin", make=make_key, param="id"),
}


def documented_routes() -> set[tuple[str, str]]:
    paths = create_app().openapi()["paths"]
    return {(method.upper(), path) for path, operations in paths.items() for method in operations}


def call(row: Row, route: tuple[str, str], owner: Account, caller: Account | None, platform: Platform) -> Any:
    """`route` over an object of `owner`, called by `caller` (None: without a key) with a body that is right for the owner."""
    method, path = route
    if row.make is not None:
        for made in row.make(platform, owner).split(" "):
            path = re.sub(r"{\w+}", quote(made, safe=":"), path, count=1)
    arguments: dict[str, Any] = {"json": row.body(owner)} if row.body else {}
    if route == ("POST", "/v1/files"):
        arguments = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", ROW)}}
    sender = caller.request if caller else platform.http.request
    return sender(method, path, **arguments)


def test_every_route_has_a_row() -> None:
    assert documented_routes() == ROWS.keys() | PUBLIC


@pytest.mark.parametrize("route", ROWS, ids=" ".join)
def test_anonymous_is_told_to_send_a_key(route: tuple[str, str], owner: Account, platform: Platform) -> None:
    answer = call(ROWS[route], route, owner, None, platform)
    assert_error(answer, 401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("route", ROWS, ids=" ".join)
def test_key_without_the_scope_is_refused(route: tuple[str, str], owner: Account, platform: Platform) -> None:
    """One key with every scope but those that open the route."""
    row = ROWS[route]
    opens = {row.scope, "admin"} | ({"graders:write"} if route[1].startswith("/v1/graders") else set())
    limited = platform.account(tuple(scope for scope in ADMIN_SCOPES if scope not in opens), owner.project_id)
    assert_error(call(row, route, owner, limited, platform), 403, "insufficient_scope")


@pytest.mark.parametrize("route", ROWS, ids=" ".join)
def test_owner_needs_no_other_scope(route: tuple[str, str], owner: Account, platform: Platform) -> None:
    row = ROWS[route]
    exact = platform.account((row.scope, *row.also), owner.project_id)
    assert call(row, route, owner, exact, platform).status_code in (200, 202)
    for scope in row.also:
        fewer = platform.account(tuple({row.scope, *row.also} - {scope}), owner.project_id)
        assert_error(call(row, route, owner, fewer, platform), 403, "insufficient_scope")


@pytest.mark.parametrize("route", [route for route, row in ROWS.items() if row.make], ids=" ".join)
def test_other_project_sees_nothing_and_changes_nothing(
    route: tuple[str, str], owner: Account, stranger: Account, platform: Platform
) -> None:
    row = ROWS[route]
    assert_error(call(row, route, owner, stranger, platform), 404, row.code, row.param)


@pytest.mark.parametrize("path", [path for method, path in ROWS if method == "GET" and "{" not in path])
def test_lists_hold_only_what_is_the_projects_own(path: str, owner: Account, stranger: Account, platform: Platform) -> None:
    for make in (make_file, make_job, make_grader, make_key, make_model):
        make(platform, owner)
    of_stranger = {item["id"] for item in stranger.get(path).json()["data"]}
    of_owner = {item["id"] for item in owner.get(path).json()["data"]}
    shared = {item["id"] for item in owner.get("/v1/models").json()["data"] if item["kind"] == "base"}
    assert of_owner - of_stranger
    assert not (of_owner & of_stranger) - shared


@pytest.mark.parametrize("key", ["", "hone-", "hone-" + "x" * 43, "\u00e9\u00e9"])
def test_wrong_keys_all_get_the_same_answer(key: str, platform: Platform) -> None:
    answer = platform.http.get("/v1/models", headers={"authorization": f"Bearer {key}".encode("latin-1")})
    assert_error(answer, 401, "invalid_api_key")


def test_revoked_key_opens_nothing_from_the_next_request_on(owner: Account, platform: Platform) -> None:
    created = owner.post("/v1/admin/api_keys", {"name": "k", "scopes": ["models:read"]}).json()
    revoked = Account(owner.project_id, created["key"], owner.http)
    assert revoked.get("/v1/models").status_code == 200
    assert owner.delete(f"/v1/admin/api_keys/{created['id']}").json()["revoked_at"] is not None
    assert_error(revoked.get("/v1/models"), 401, "invalid_api_key")


@pytest.mark.parametrize(("method", "path"), sorted(PUBLIC))
def test_public_routes_need_no_key(method: str, path: str, platform: Platform) -> None:
    assert platform.http.request(method, path).json() == {"status": "ok"}
