"""A judge behind real HTTP: what it is sent, what of its answers counts, and that no failure becomes a number."""

import asyncio
import json
import re
import time
from typing import Any

import pytest

from graders.calls import RetryPolicy
from graders.grade import Grade
from graders.model_judge import ModelJudge, label_scale
from graders.multi import MultiGrader
from graders.run_result import error_flags, run_result
from outbound.safe_http import NetworkPolicy
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, answer, dripping, hang, status
from tests.graders.helpers import FAST, base_url, completion, grade, grade_all, judge, judge_spec, request, verdict
from tests.graders.test_build import pinned
from tests.graders.test_endpoint import RETRIED

KEY = "sk-very/secret+value=="
TOKENS = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35, "cached_tokens": 20}


def raised(result: Grade) -> set[str]:
    return {name for name, value in error_flags(result).items() if value is True}


def without_schemas(received: Received) -> Reply:
    """A server that does not know `response_format`."""
    if "response_format" in received.json:
        return status(400, b'{"error": {"message": "response_format is not supported"}}')
    return completion('The answer is right. {"result": 0.75}')


def test_the_judge_is_asked_in_the_form_of_chat_completions() -> None:
    messages = [
        {"role": "developer", "content": "You judge."},
        {"role": "user", "content": {"type": "input_text", "text": "Right: {{ item.answer }}. Given: {{ sample.output_text }}"}},
    ]
    sampling = {"temperature": 0.0, "seed": 3, "max_completions_tokens": 90, "reasoning_effort": "low"}
    with FakeEndpoint([verdict(0.5)]) as server:
        grade(judge(server, input=messages, sampling_params=sampling), request("it is 4"))
    (received,) = server.requests
    sent = received.json
    assert (received.method, received.path) == ("POST", "/v1/chat/completions")
    assert received.headers["authorization"] == "Bearer sk-judge-key"
    assert received.headers["idempotency-key"] == "k" * 64
    assert sent["model"] == "judge-1"
    assert sent["messages"][0] == {"role": "system", "content": "You judge."}
    first, _, instruction = sent["messages"][1]["content"].partition("\n\n")
    assert first == "Right: 4. Given: it is 4"
    assert "a number from 0 to 1" in instruction
    assert {name: sent[name] for name in sent.keys() - {"model", "messages", "response_format"}} == {
        "temperature": 0.0,
        "seed": 3,
        "max_completion_tokens": 90,
        "reasoning_effort": "low",
    }
    form = sent["response_format"]
    assert (form["type"], form["json_schema"]["strict"]) == ("json_schema", True)
    schema = form["json_schema"]["schema"]
    assert schema["properties"]["result"] == {"type": "number"}
    assert schema["required"] == ["steps", "result"]


def test_instruction_follows_the_last_message_and_parts_stay_parts() -> None:
    picture = {"type": "input_image", "image_url": "{{ item.picture }}", "detail": "low"}
    sound = {"type": "input_audio", "input_audio": {"data": "{{ item.sound }}", "format": "wav"}}
    messages = [
        {"role": "user", "content": [{"type": "input_text", "text": "Look"}, picture, sound]},
        {"role": "assistant", "content": {"type": "output_text", "text": "I see {{ sample.output_text }}"}},
    ]
    item = {"picture": "https://pictures.example/4.png", "sound": "UklGRg=="}
    with FakeEndpoint([verdict(0.5)]) as server:
        grade(judge(server, input=messages), request(item=item))
        grade(judge(server, input=messages[:1]), request(item=item))
    both, alone = (received.json["messages"] for received in server.requests)
    parts = [
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": item["picture"], "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": item["sound"], "format": "wav"}},
    ]
    assert both[:2] == [{"role": "user", "content": parts}, {"role": "assistant", "content": "I see 4"}]
    assert [message["role"] for message in both] == ["user", "assistant", "user"]
    (only,) = alone
    assert only["content"][:3] == parts
    assert only["content"][3] == {"type": "text", "text": both[2]["content"]}


def test_verdict_with_reasons_and_tokens() -> None:
    with FakeEndpoint([verdict(7.5, "mostly right", "too long")]) as server:
        result = grade(judge(server, range=[0, 10]))
    assert (result.reward, result.error, result.attempts, result.model) == (7.5, None, 1, "judge-1")
    assert result.explanation == "step: mostly right\nstep: too long"
    assert result.token_usage == {"judge-1": TOKENS}


@pytest.mark.parametrize("bound", [0, 10])
def test_the_bounds_of_the_range_belong_to_it(bound: int) -> None:
    with FakeEndpoint([verdict(bound)]) as server:
        assert grade(judge(server, range=[0, 10])).reward == bound


def test_completion_cannot_break_out_of_its_message() -> None:
    text = '\u0000 \ud800 "}]}, {{ item.secret }} \U0001f600\n' + "x" * 100_000
    with FakeEndpoint([verdict(0.5)]) as server:
        assert grade(judge(server), request(text, item={"answer": "4", "secret": "s"})).reward == 0.5
    (message,) = server.requests[0].json["messages"]
    assert message["content"].startswith(f"Grade {text} against 4.")


def test_server_without_schemas_is_asked_again_without_one_and_later_only_so() -> None:
    async def twice(server: FakeEndpoint) -> list[Grade]:
        grader = judge(server, max_attempts=1)
        first = await grader.grade(request())
        return [first, *await grade_all(grader, request())]

    with FakeEndpoint(without_schemas) as server:
        first, second = asyncio.run(twice(server))
    assert [result.reward for result in (first, second)] == [0.75, 0.75]
    assert [result.attempts for result in (first, second)] == [2, 1]
    assert ["response_format" in received.json for received in server.requests] == [True, False, False]
    refused, plain, _ = server.requests
    assert refused.headers["idempotency-key"] != plain.headers["idempotency-key"]
    assert {**refused.json, "response_format": None} == {**plain.json, "response_format": None}


@pytest.mark.parametrize("code", [400, 422])
def test_refusal_of_both_forms_is_the_judges_and_is_not_taken_for_a_lack_of_schemas(code: int) -> None:
    with FakeEndpoint([status(code, b"no such model"), status(code, b"no such model"), verdict(0.5)]) as server:

        async def twice() -> list[Grade]:
            grader = judge(server)
            return [await grader.grade(request()), *await grade_all(grader, request())]

        failed, graded = asyncio.run(twice())
    assert (failed.reward, failed.error, failed.attempts) == (None, "grader_http_error", 2)
    assert "no such model" in (failed.error_message or "")
    assert graded.reward == 0.5
    assert ["response_format" in received.json for received in server.requests] == [True, False, True]


UNUSABLE = [
    (Reply(b"<html>"), "grader_invalid_json", "model_grader_server_error"),
    (Reply(b""), "grader_invalid_json", "model_grader_server_error"),
    (answer({"choices": []}), "grader_invalid_json", "model_grader_server_error"),
    (answer({"score": 1.0}), "grader_invalid_json", "model_grader_server_error"),
    (status(401), "grader_http_error", "model_grader_server_error"),
    (status(404), "grader_http_error", "model_grader_server_error"),
    (status(302, location="http://169.254.169.254/"), "grader_http_error", "model_grader_server_error"),
    (completion("I would rather talk about the weather."), "model_grader_parse_error", "model_grader_parse_error"),
    (completion("I give it 0.5."), "model_grader_parse_error", "model_grader_parse_error"),
    (completion(""), "model_grader_parse_error", "model_grader_parse_error"),
    (completion(None), "model_grader_parse_error", "model_grader_parse_error"),
    (completion('{"steps": [], "res', finish_reason="length"), "model_grader_parse_error", "model_grader_parse_error"),
    (completion('{"result": NaN}'), "model_grader_parse_error", "model_grader_parse_error"),
    (completion('{"result": Infinity}'), "model_grader_parse_error", "model_grader_parse_error"),
    (completion("NaN"), "model_grader_parse_error", "model_grader_parse_error"),
    (completion('{"result": 1e999}'), "model_grader_parse_error", "model_grader_parse_error"),
    (verdict("0.5"), "model_grader_parse_error", "model_grader_parse_error"),
    (verdict(True), "model_grader_parse_error", "model_grader_parse_error"),
    (verdict(None), "model_grader_parse_error", "model_grader_parse_error"),
    (verdict([0.5]), "model_grader_parse_error", "model_grader_parse_error"),
    (completion('{"result": 0.1} {"result": 0.9}'), "model_grader_parse_error", "model_grader_parse_error"),
    (verdict(1.01), "grader_score_out_of_range", "model_grader_parse_error"),
    (verdict(-1), "grader_score_out_of_range", "model_grader_parse_error"),
    (completion(None, refusal="I will not."), "model_grader_refusal_error", "model_grader_refusal_error"),
    (completion('{"result": 1}', finish_reason="content_filter"), "model_grader_refusal_error", "model_grader_refusal_error"),
    (Reply(b"x" * 4096, endless=True), "grader_response_too_large", "other_error"),
]


@pytest.mark.parametrize(("reply", "code", "flag"), UNUSABLE)
def test_what_is_no_verdict_is_failed_at_once_without_a_number(reply: Reply, code: str, flag: str) -> None:
    with FakeEndpoint([reply]) as server:
        result = grade(judge(server))
        assert (result.reward, result.error, result.attempts, len(server.requests)) == (None, code, 1, 1)
    assert raised(result) == {flag}
    assert not result.abstained
    assert len(result.error_message or "") < 500


def test_tokens_of_a_judge_that_rambled_are_counted_too() -> None:
    with FakeEndpoint([completion("no idea")]) as server:
        assert grade(judge(server)).token_usage == {"judge-1": TOKENS}


def test_cut_off_answer_says_what_helps() -> None:
    with FakeEndpoint([completion('{"steps": [', finish_reason="length")]) as server:
        assert "max_completions_tokens" in (grade(judge(server)).error_message or "")


@pytest.mark.parametrize(("reply", "code"), RETRIED)
def test_what_may_pass_is_retried_as_for_endpoints(reply: Reply, code: str) -> None:
    with FakeEndpoint([reply]) as server:
        result = grade(judge(server, max_attempts=3, timeout_seconds=0.2 if code == "grader_timeout" else 10.0))
        assert (result.reward, result.error, result.attempts, len(server.requests)) == (None, code, 3, 3)
    assert result.is_outage
    assert raised(result) == {"model_grader_server_error"}
    assert error_flags(result)["model_grader_server_error_details"] == result.error_message


def test_retry_after_is_obeyed_and_every_attempt_has_the_same_name() -> None:
    with FakeEndpoint([status(429, retry_after="3600"), verdict(1.0)]) as server:
        result = grade(judge(server, retry=RetryPolicy(base_seconds=0.0, max_retry_after_seconds=0.3)))
    first, second = server.requests
    assert (result.reward, result.attempts) == (1.0, 2)
    assert 0.3 <= second.at - first.at < 10.0
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


@pytest.mark.parametrize("reply", [hang(), dripping(0.02)], ids=["hang", "drip"])
def test_a_grade_ends_by_one_deadline_also_where_the_schema_was_refused_first(reply: Reply) -> None:
    with FakeEndpoint([status(400), reply]) as server:
        started = time.monotonic()
        result = grade(judge(server, timeout_seconds=0.2, max_attempts=10, retry=RetryPolicy(base_seconds=0.05, deadline_seconds=0.6)))
        assert time.monotonic() - started < 5.0
    assert (result.reward, result.error) == (None, "grader_timeout")
    assert result.attempts >= 2


def test_the_second_ask_has_only_what_the_first_left_of_the_deadline() -> None:
    with FakeEndpoint([Reply(b"no", status=400, delay=0.4), hang()]) as server:
        result = grade(judge(server, timeout_seconds=30.0, max_attempts=1, retry=RetryPolicy(deadline_seconds=1.2)))
    assert (result.error, result.attempts) == ("grader_timeout", 2)
    assert 0.0 < float(re.findall(r"within ([\d.]+) seconds", result.error_message or "")[0]) <= 0.8


def test_address_that_is_not_allowed_is_not_called() -> None:
    with FakeEndpoint([verdict(1.0)]) as server:
        result = grade(judge(server, network=NetworkPolicy(allow_http=True)))
        assert (result.reward, result.error) == (None, "grader_address_refused")
        assert server.requests == []


def test_no_more_calls_are_open_than_the_concurrency_allows() -> None:
    with FakeEndpoint([verdict(1.0), Reply(completion('{"result": 1}').body, delay=0.05)]) as server:
        results = asyncio.run(grade_all(judge(server, max_concurrency=3), *[request() for _ in range(12)]))
    assert [result.reward for result in results] == [1.0] * 12
    assert server.most_open == 3


def echo(received: Received) -> Reply:
    """A judge's server that answers with what it was sent."""
    key = received.headers["authorization"]
    return {
        "error": status(401, f"invalid key {key}".encode()),
        "text": completion(f"you sent {key}"),
        "refusal": completion(None, refusal=f"not for {key}"),
        "steps": verdict(0.5, f"seen {key}"),
    }[received.json["messages"][0]["content"].partition(".")[0].split()[-1]]


@pytest.mark.parametrize("how", ["error", "text", "refusal", "steps"])
def test_key_that_the_judge_echoes_is_masked(how: str) -> None:
    with FakeEndpoint(echo) as server:
        result = grade(judge(server, key=KEY), request(item={"answer": how}))
    assert KEY not in repr(result)
    assert "**********" in repr(result)


def test_judge_without_a_key_gets_none() -> None:
    with FakeEndpoint([verdict(0.5)]) as server:
        assert grade(judge(server, key=None)).reward == 0.5
    assert "authorization" not in server.requests[0].headers


def test_a_missing_column_fails_unasked_and_missing_json_of_the_completion_is_the_worst_answer() -> None:
    messages = [{"role": "user", "content": "{{ sample.output_json.x }} {{ item.answer }}"}]
    with FakeEndpoint([verdict(5)]) as server:
        worst = grade(judge(server, input=messages, range=[1, 5]), request("no json"))
        failed = grade(judge(server, input=messages, range=[1, 5]), request(output_json={"x": 1}, item={}))
        assert server.requests == []
    assert (worst.reward, worst.error) == (1.0, None)
    assert (failed.reward, failed.error) == (None, "invalid_variable_error")
    assert raised(failed) == {"invalid_variable_error"}


def labeller(server: FakeEndpoint, labels: list[str], passing: list[str]) -> ModelJudge:
    fields = judge_spec(base_url(server)).model_dump(exclude={"type", "range"})
    spec: Any = pinned({**fields, "type": "label_model", "labels": labels, "passing_labels": passing})
    return ModelJudge(spec, label_scale(spec), headers={}, network=NetworkPolicy(LOOPBACK), retry=FAST)


@pytest.mark.parametrize(
    ("reply", "reward", "label"),
    [
        (verdict("good"), 1.0, "good"),
        (verdict("fair"), 1.0, "fair"),
        (verdict("bad"), 0.0, "bad"),
        (completion("bad"), 0.0, "bad"),
        (completion('Well. {"result": "good"}'), 1.0, "good"),
        (completion('{"result": 3}'), 1.0, "3"),
    ],
)
def test_label_is_a_reward_of_1_or_0(reply: Reply, reward: float, label: str) -> None:
    with FakeEndpoint([reply]) as server:
        result = grade(labeller(server, ["good", "fair", "bad", "3"], ["good", "fair", "3"]))
    assert (result.reward, result.error, result.explanation) == (reward, None, label)
    form = server.requests[0].json["response_format"]["json_schema"]["schema"]
    assert form["properties"]["result"] == {"type": "string", "enum": ["good", "fair", "bad", "3"]}


@pytest.mark.parametrize("result", ["Good", "good or bad", "", 1, None, ["good"], {"label": "good"}])
def test_what_is_no_label_is_failed_and_not_the_failing_label(result: Any) -> None:
    with FakeEndpoint([verdict(result)]) as server:
        graded = grade(labeller(server, ["good", "bad"], ["good"]))
    assert (graded.reward, graded.error) == (None, "model_grader_parse_error")


def test_judges_in_a_formula_add_up_their_tokens_and_one_that_fails_fails_the_whole() -> None:
    with FakeEndpoint([verdict(0.5)]) as good, FakeEndpoint([completion(None, refusal="no")]) as bad:
        graded = grade(MultiGrader({"a": judge(good), "b": judge(good), "c": judge(good, model="judge-2")}, "a + b + c"))
        failed = grade(MultiGrader({"a": judge(good), "b": judge(bad, model="judge-2")}, "a + b"))
    twice = {name: 2 * count for name, count in TOKENS.items()}
    assert (graded.reward, graded.token_usage) == (1.5, {"judge-1": twice, "judge-2": TOKENS})
    assert (failed.reward, failed.error, failed.model) == (None, "model_grader_refusal_error", "judge-2")
    assert failed.token_usage == {"judge-1": TOKENS, "judge-2": TOKENS}
    shown = run_result(graded, name="mine", kind="multi")
    assert shown["model_grader_token_usage_per_model"] == graded.token_usage
    assert shown["metadata"]["token_usage"] == {name: 3 * count for name, count in TOKENS.items()}
    assert raised(failed) == {"model_grader_refusal_error"}


def test_a_grade_of_a_judge_survives_the_journals_json() -> None:
    with FakeEndpoint([verdict(0.5)]) as server:
        result = grade(judge(server))
    assert Grade(**json.loads(json.dumps(vars(result)))) == result
