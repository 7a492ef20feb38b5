"""What a judge may write, and what of it counts."""

import json
from typing import Any

import pytest

from core.errors import InvalidGrade
from graders.judge_reply import find_result, parse_completion


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"steps": [], "result": 0.5}', 0.5),
        ('```json\n{"result": 0.5}\n```', 0.5),
        ('Let me see. {"result": 0.5} That is my verdict.', 0.5),
        ('{"a": 1} and then {"result": 0.5}', 0.5),
        ('{"result": 0.5} again: {"result": 0.50}', 0.5),
        ('<think>{"result": 1.0}</think>{"result": 0.5}', 0.5),
        ('first {"result": 1.0} or so</think>\n{"result": 0.5}', 0.5),
        ('{"steps": [{"description": "it says {\\"result\\": 1}", "conclusion": "no"}], "result": 0.5}', 0.5),
        ('{broken {"result": 0.5}', 0.5),
        (" 0.5\n", 0.5),
        ("polite", "polite"),
        ('"polite"', "polite"),
        ('{"result": "polite"}', "polite"),
    ],
)
def test_the_one_result_is_found_wherever_it_stands(text: str, value: Any) -> None:
    assert find_result(text).value == value


@pytest.mark.parametrize(
    "text", ['{"result": 0.2} no, {"result": 0.9}', '{"result": NaN} {"result": NaN}', '{"result": 1} {"result": "1"}']
)
def test_results_that_differ_are_none(text: str) -> None:
    with pytest.raises(InvalidGrade, match="differ"):
        find_result(text)


@pytest.mark.parametrize("text", ["", "no idea", "0.5 or 0.7", "I give 0.5", '{"score": 0.5}', '{"outer": {"result": 0.5}}', "[" * 100_000])
def test_text_without_a_result_is_left_as_it_is_and_never_read_as_a_number(text: str) -> None:
    assert not isinstance(find_result(text).value, int | float)


def test_hostile_nesting_ends_soon() -> None:
    assert isinstance(find_result('{"a":' * 200_000).value, str)
    assert isinstance(find_result("{" * 1_000_000).value, str)


def test_steps_are_lines_and_what_is_no_step_is_left_out() -> None:
    steps = [{"description": "units", "conclusion": "missing"}, {"conclusion": "right"}, "x", {"description": 3}]
    assert find_result(json.dumps({"steps": steps, "result": 1})).steps == "units: missing\nright"
    assert find_result('{"steps": "none", "result": 1}').steps is None


def completion(message: Any, **more: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": more.pop("finish_reason", "stop")}], **more}).encode()


def test_completion_with_its_tokens() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 8}}
    parsed = parse_completion(completion({"content": "hi"}, usage=usage))
    assert (parsed.text, parsed.refusal, parsed.is_cut_off) == ("hi", None, False)
    assert parsed.token_usage == {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, "cached_tokens": 8}


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (None, {}),
        ("many", {}),
        (
            {"prompt_tokens": "x", "completion_tokens": -1, "total_tokens": True, "prompt_tokens_details": []},
            {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "cached_tokens": 0},
        ),
    ],
)
def test_malformed_usage_counts_nothing_and_spoils_nothing(usage: Any, counted: dict[str, int]) -> None:
    assert parse_completion(completion({"content": "hi"}, usage=usage)).token_usage == counted


def test_content_in_parts_is_its_text_and_none_is_empty() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "0."}, {"type": "text", "text": "5"}]
    assert parse_completion(completion({"content": parts})).text == "0.5"
    assert parse_completion(completion({"content": None})).text == ""


def test_refusal_and_end_are_told() -> None:
    assert parse_completion(completion({"content": None, "refusal": "I will not."})).refusal == "I will not."
    assert parse_completion(completion({"content": ""}, finish_reason="content_filter")).refusal is not None
    assert parse_completion(completion({"content": "0."}, finish_reason="length")).is_cut_off


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": "x"}]}',
        b'{"choices": 3}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_chat_completion_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidGrade, match="not a chat completion"):
        parse_completion(body)
