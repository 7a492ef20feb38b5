"""Judges at every door of the API: run, validate, submit. Their key is a secret like any header."""

from copy import deepcopy
from typing import Any

import pytest

from database.jobs import get_job
from database.models import Job
from tests.api.platform import STRING_CHECK, Account, Platform, assert_error
from tests.api.test_graders import RUN, VALIDATE, raised, run
from tests.fake_endpoint import FakeEndpoint, Received, Reply, status
from tests.graders.helpers import base_url, completion, verdict

KEY = "sk-hush-hush"
SCORE: dict[str, Any] = {
    "type": "score_model",
    "name": "taste",
    "base_url": "https://judge.example.com/v1",
    "api_key": KEY,
    "model": "judge-1",
    "input": [{"role": "user", "content": "Grade {{ sample.output_text }} against {{ item.answer }}."}],
}
LABEL = SCORE | {"type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"]}
SIMILAR = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "evaluation_metric": "rouge_1"}
TOKENS = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35, "cached_tokens": 20}
JOBS = "/v1/fine_tuning/jobs"


def at(server: FakeEndpoint, grader: dict[str, Any] = SCORE) -> dict[str, Any]:
    return grader | {"base_url": base_url(server)}


def test_run_of_a_judge_shows_verdict_model_and_tokens(owner: Account) -> None:
    with FakeEndpoint([verdict(0.75, "fine")]) as server:
        body = run(owner, at(server), item={"answer": "4"})
    assert body["reward"] == 0.75
    assert body["model_grader_token_usage_per_model"] == {"judge-1": TOKENS}
    metadata = body["metadata"]
    assert (metadata["name"], metadata["type"], metadata["sampled_model_name"]) == ("taste", "score_model", "judge-1")
    assert (metadata["token_usage"], metadata["explanation"]) == (TOKENS, "step: fine")
    assert raised(metadata["errors"]) == set()
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert "Grade 4 against 4." in server.requests[0].json["messages"][0]["content"]


def test_run_of_every_kind_in_one_formula(owner: Account) -> None:
    with FakeEndpoint([verdict(0.5)]) as scoring, FakeEndpoint([verdict("bad")]) as labelling:
        members = {"exact": STRING_CHECK, "near": SIMILAR, "score": at(scoring), "label": at(labelling, LABEL)}
        body = run(owner, {"type": "multi", "graders": members, "calculate_output": "exact + near + score + label"}, item={"answer": "4"})
    assert body["reward"] == 2.5
    assert body["sub_rewards"] == {"exact": 1.0, "near": 1.0, "score": 0.5, "label": 0.0}
    assert body["model_grader_token_usage_per_model"] == {"judge-1": {name: 2 * count for name, count in TOKENS.items()}}
    assert body["metadata"]["token_usage"]["total_tokens"] == 70


@pytest.mark.parametrize(
    ("reply", "flag", "code"),
    [
        (status(503), "model_grader_server_error", "grader_http_error"),
        (completion(None, refusal="no"), "model_grader_refusal_error", "model_grader_refusal_error"),
        (completion("I cannot say"), "model_grader_parse_error", "model_grader_parse_error"),
        (verdict(2), "model_grader_parse_error", "grader_score_out_of_range"),
    ],
)
@pytest.mark.parametrize("inside_multi", [False, True])
def test_judge_that_fails_is_an_answer_with_a_flag_and_is_asked_once(
    inside_multi: bool, reply: Reply, flag: str, code: str, owner: Account
) -> None:
    with FakeEndpoint([reply]) as server:
        multi = {"type": "multi", "graders": {"taste": at(server)}, "calculate_output": "taste"}
        body = run(owner, multi if inside_multi else at(server), item={"answer": "4"})
        assert len(server.requests) == 1
    assert body["reward"] is None
    assert raised(body["metadata"]["errors"]) == {flag}
    assert body["metadata"]["error"]["code"] == code
    assert (body["metadata"]["errors"]["model_grader_server_error_details"] is None) == (flag != "model_grader_server_error")


def test_run_asks_a_server_without_schemas_again_though_each_form_only_once(owner: Account) -> None:
    with FakeEndpoint([status(400), completion("0.5")]) as server:
        assert run(owner, at(server), item={"answer": "4"})["reward"] == 0.5


def test_run_shows_nothing_of_the_key_that_the_judge_echoes(owner: Account) -> None:
    def echo(request: Received) -> Reply:
        return status(401, str(request.headers).encode())

    with FakeEndpoint(echo) as server:
        answer = owner.post(RUN, {"grader": at(server), "model_sample": "4", "item": {"answer": "4"}})
    assert "hush" not in answer.text
    assert "**********" in answer.text


@pytest.mark.parametrize("grader", [SCORE, LABEL])
def test_validate_gives_the_judge_back_whole_with_its_key_masked(grader: dict[str, Any], owner: Account) -> None:
    shown = owner.post(VALIDATE, {"grader": grader}).json()["grader"]
    assert shown["api_key"] == "**********"
    assert shown["input"][0]["content"] == [{"type": "input_text", "text": SCORE["input"][0]["content"]}]
    assert owner.post(VALIDATE, {"grader": shown | {"api_key": KEY}}).json()["grader"] == shown
    multi = {"type": "multi", "graders": {"a": grader}, "calculate_output": "a"}
    assert owner.post(VALIDATE, {"grader": multi}).json()["grader"]["graders"]["a"] == shown


@pytest.mark.parametrize(
    "grader",
    [
        SCORE,
        LABEL,
        {"type": "multi", "graders": {"a": SCORE, "b": STRING_CHECK}, "calculate_output": "a + b"},
        {"type": "multi", "graders": [LABEL | {"name": "a"}], "calculate_output": "a"},
        {"type": "multi", "graders": SCORE | {"name": "a"}, "calculate_output": "a"},
    ],
)
def test_key_of_a_jobs_judge_is_masked_and_stored_encrypted(grader: dict[str, Any], owner: Account, platform: Platform) -> None:
    job = owner.create_job(grader=deepcopy(grader))
    texts = [owner.get(path).text for path in (JOBS, f"{JOBS}/{job['id']}", f"{JOBS}/{job['id']}/events")]
    with platform.database.reading() as session:
        row = get_job(session, owner.project_id, job["id"])
    columns = {column.name: getattr(row, column.name) for column in Job.__table__.columns}
    assert all("hush" not in text for text in (*texts, str(columns)))
    assert "**********" in texts[1]
    pinned = row.grader if grader["type"] != "multi" else row.grader["graders"]["a"]
    assert row.secrets is not None
    secrets = platform.http.app.state.services.secrets.decrypt(row.secrets)
    assert secrets == {pinned["secret_ref"]: {"headers": {"authorization": f"Bearer {KEY}"}, "signing_secret": None}}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"api_key": f"{KEY}\r\nx: y"}, "invalid_value", "api_key"),
    ({"api_key": [KEY]}, "invalid_type", "api_key"),
    ({"api_key": {"hush": KEY}}, "invalid_type", "api_key"),
    ({"api_kye": KEY}, "unknown_parameter", "api_kye"),
    ({"base_url": "https://judge.example.com/v1/chat/completions"}, "invalid_value", "base_url"),
    ({"base_url": "https://judge.example.com/v1?version=1"}, "invalid_value", "base_url"),
    ({"base_url": "http://169.254.169.254/v1"}, "address_refused", "base_url"),
    ({"base_url": "https://user:hush@example.com/v1"}, "address_refused", "base_url"),
    ({"range": [1, 1]}, "invalid_value", "range"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "invalid_value", "input.0.role"),
    ({"input": [{"role": "user", "content": "{{ nothing }}"}]}, "invalid_variable_error", "input.0.content"),
    ({"sampling_params": {"temperature": 3}}, "invalid_value", "sampling_params.temperature"),
    ({"sampling_params": {"max_tokens": 3}}, "unknown_parameter", "sampling_params.max_tokens"),
    ({"timeout_seconds": 601}, "invalid_value", "timeout_seconds"),
]


@pytest.mark.parametrize("prefix", ["grader", "grader.graders.a", "method.reinforcement.grader"])
@pytest.mark.parametrize(("changes", "code", "param"), REFUSED)
def test_malformed_judge_names_its_field_and_never_repeats_a_key(
    prefix: str, changes: dict[str, Any], code: str, param: str, owner: Account
) -> None:
    grader = SCORE | changes
    if prefix == "grader.graders.a":
        grader = {"type": "multi", "graders": [grader | {"name": "a"}], "calculate_output": "a"}
    if prefix == "method.reinforcement.grader":
        answer = owner.post(JOBS, owner.job_request(grader=grader))
    else:
        answer = owner.post(VALIDATE, {"grader": grader})
    assert_error(answer, 400, code, f"{prefix}.{param}")
    assert "hush" not in answer.text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"passing_labels": ["good", "fair"]}, "'fair'"),
        ({"labels": ["good", "good"]}, "differ"),
    ],
)
def test_labels_that_do_not_fit_together_are_refused_with_both_names(changes: dict[str, Any], word: str, owner: Account) -> None:
    answer = owner.post(VALIDATE, {"grader": LABEL | changes})
    assert word in assert_error(answer, 400, "invalid_value", "grader")
    assert "hush" not in answer.text


def test_list_of_graders_without_names_is_refused_without_repeating_them(owner: Account) -> None:
    for graders in ([SCORE | {"name": None}], [SCORE | {"name": ["x"]}], [SCORE, SCORE]):
        answer = owner.post(VALIDATE, {"grader": {"type": "multi", "graders": graders, "calculate_output": "a"}})
        assert_error(answer, 400, "invalid_value", "grader.graders")
        assert "hush" not in answer.text


@pytest.mark.parametrize("member", [SIMILAR, SCORE, {"type": "endpoint", "url": "https://grader.example.com/"}])
def test_threshold_inside_multi_is_refused_and_alone_accepted(member: dict[str, Any], owner: Account) -> None:
    member = member | {"pass_threshold": 0.5}
    assert owner.post(VALIDATE, {"grader": member}).json()["grader"]["pass_threshold"] == 0.5
    answer = owner.post(VALIDATE, {"grader": {"type": "multi", "graders": {"a": member}, "calculate_output": "a"}})
    assert "'pass_threshold' of 'a'" in assert_error(answer, 400, "invalid_value", "grader.graders")


@pytest.mark.parametrize("metric", ["meteor", "cosine"])
def test_metric_that_cannot_be_had_is_refused_at_submit(metric: str, owner: Account) -> None:
    answer = owner.post(JOBS, owner.job_request(grader=SIMILAR | {"evaluation_metric": metric}))
    assert metric in assert_error(answer, 400, "invalid_value", "method.reinforcement.grader.evaluation_metric")
