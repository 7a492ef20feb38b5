import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from client import errors, transport
from client.client import Client
from core.errors import InvalidRequest
from core.grader_specs import EndpointOptions

Handler = Callable[[httpx.Request], httpx.Response]
JOB = {
    "model": "m",
    "training_file": "file-a",
    "method": {
        "type": "reinforcement",
        "reinforcement": {"grader": {"type": "string_check", "input": "a", "reference": "b", "operation": "eq"}},
    },
}


def client(handler: Handler) -> Client:
    return Client("http://hone.test/v1", "hone-key", http=httpx.MockTransport(handler))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequest),
        (401, errors.NotAuthenticated),
        (403, errors.PermissionDenied),
        (404, errors.NotFound),
        (413, errors.BadRequest),
        (429, errors.RateLimited),
        (500, errors.ServerError),
        (503, errors.ServerError),
    ],
)
def test_status_decides_the_exception_and_the_body_fills_it(status: int, kind: type[errors.ApiError]) -> None:
    body = {"error": {"message": "no", "type": "x", "param": "model", "code": "model_not_found"}, "request_id": "req-1"}
    with pytest.raises(kind) as caught:
        client(lambda request: httpx.Response(status, json=body)).jobs.retrieve("ftjob-1")
    error = caught.value
    assert (type(error), error.status, error.message, error.param, error.code, error.request_id) == (
        kind,
        status,
        "no",
        "model",
        "model_not_found",
        "req-1",
    )


def test_answer_of_another_server_is_not_taken_for_an_object() -> None:
    with pytest.raises(errors.ConnectionFailed, match="is not a JSON object"):
        client(lambda request: httpx.Response(200, text="<html>")).models.list()
    with pytest.raises(errors.NotFound, match="answered 404"):
        client(lambda request: httpx.Response(404, text="<html>")).models.list()


def test_a_post_that_may_have_arrived_is_never_sent_twice() -> None:
    calls = []

    def drop(request: httpx.Request) -> httpx.Response:
        calls.append(request.method)
        raise httpx.ReadError("gone")

    with pytest.raises(errors.ConnectionFailed):
        client(drop).jobs.create(JOB)
    assert calls == ["POST"]
    with pytest.raises(errors.ConnectionFailed):
        client(drop).jobs.retrieve("ftjob-1")
    assert calls == ["POST", "GET", "GET", "GET"]


def test_a_post_that_was_refused_for_its_rate_is_repeated() -> None:
    answers = iter([429, 429, 200])
    hone = client(lambda request: httpx.Response(next(answers), json={"id": "ftjob-1"}))
    assert hone.jobs.create(JOB)["id"] == "ftjob-1"


def test_refusals_are_not_repeated_and_outages_only_three_times() -> None:
    calls = []

    def answer(status: int) -> Handler:
        def handler(request: httpx.Request) -> httpx.Response:
            calls.append(status)
            return httpx.Response(status, json={"error": {"message": "no"}})

        return handler

    for status, expected in ((400, 1), (404, 1), (503, 3), (429, 3)):
        calls.clear()
        with pytest.raises(errors.ApiError):
            client(answer(status)).jobs.retrieve("ftjob-1")
        assert len(calls) == expected, status


def test_mistake_in_a_job_is_named_without_asking_the_server() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise AssertionError("asked the server")

    with pytest.raises(InvalidRequest, match="traning_file") as caught:
        client(refuse).jobs.create({**JOB, "traning_file": "file-b"})
    assert caught.value.param == "traning_file"


def test_every_event_follows_the_cursor_to_the_end() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        after = request.url.params.get("after")
        start = 0 if after is None else int(after) + 1
        data = [{"id": str(index)} for index in range(start, min(start + 2, 5))]
        return httpx.Response(200, json={"data": data, "has_more": start + 2 < 5})

    assert [event["id"] for event in client(answer).jobs.every_event("ftjob-1")] == ["0", "1", "2", "3", "4"]


def test_model_names_with_slashes_stay_one_segment_and_keep_their_colons() -> None:
    paths = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path.decode())
        return httpx.Response(200, json={})

    client(answer).models.retrieve("ft:Qwen/Q:org::x")
    assert paths == ["/v1/models/ft:Qwen%2FQ:org::x"]


def test_queries_and_bodies_on_the_wire(tmp_path: Path) -> None:
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        requests.append(request)
        return httpx.Response(200, json={"id": "x", "data": [], "has_more": False})

    hone = client(answer)
    hone.jobs.list(metadata={"team": "a"}, limit=5)
    assert dict(requests[-1].url.params) == {"metadata[team]": "a", "limit": "5"}
    hone.graders.create("g", EndpointOptions(url="http://127.0.0.1:9/grade", reward_range=(0.0, 1.0)), {"X-Key": "s"})
    sent = json.loads(requests[-1].content)
    assert (sent["name"], sent["url"], sent["reward_range"], sent["headers"]) == (
        "g",
        "http://127.0.0.1:9/grade",
        [0.0, 1.0],
        {"X-Key": "s"},
    )
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n")
    hone.files.upload(tmp_path / "rows.jsonl")
    assert b'filename="rows.jsonl"' in requests[-1].content
    assert b'name="purpose"' in requests[-1].content
    assert all(request.headers["Authorization"] == "Bearer hone-key" for request in requests)
