"""Parsing of requests: each wrong field gets its name, what came, and for an unknown one the nearest known."""

from typing import Any

import pytest

from core.errors import InvalidRequest
from core.grader_specs import MultiGrader, RegisteredEndpointGrader, ScoreModelGrader
from core.judge_specs import SamplingParams
from core.rows import parse_row
from core.specs import parse_grader, parse_job_request

STRING_CHECK = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}


def request(**changes: Any) -> dict[str, Any]:
    base = {"model": "m", "training_file": "file-1", "method": {"type": "reinforcement", "reinforcement": {"grader": STRING_CHECK}}}
    return {**base, **changes}


def with_hyperparameters(**hyperparameters: Any) -> dict[str, Any]:
    return request(method={"type": "reinforcement", "reinforcement": {"grader": STRING_CHECK, "hyperparameters": hyperparameters}})


def test_smallest_request_is_accepted() -> None:
    assert parse_job_request(request()).method.reinforcement.algorithm == "grpo"


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        ([], "invalid_type", None),
        ({"training_file": "f"}, "missing_required_parameter", "model"),
        (request(model=3), "invalid_type", "model"),
        (request(sufix="x"), "unknown_parameter", "sufix"),
        (request(suffix=".hidden"), "invalid_value", "suffix"),
        (request(seed=-1), "invalid_value", "seed"),
        (request(method={"type": "supervised"}), "invalid_value", "method.type"),
        (request(metadata={"k": 1}), "invalid_type", "metadata.k"),
        (with_hyperparameters(batch_sise=3), "unknown_parameter", "method.reinforcement.hyperparameters.batch_sise"),
        (with_hyperparameters(batch_size="many"), "invalid_type", "method.reinforcement.hyperparameters.batch_size"),
    ],
)
def test_wrong_field_is_named(raw: Any, code: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_job_request(raw)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_unknown_field_gets_the_nearest_known_name() -> None:
    with pytest.raises(InvalidRequest, match="Did you mean 'batch_size'"):
        parse_job_request(with_hyperparameters(batch_sise=3))


@pytest.mark.parametrize(
    ("graders", "names"),
    [
        ({"a": STRING_CHECK, "b": STRING_CHECK}, ["a", "b"]),
        ([{**STRING_CHECK, "name": "a"}], ["a"]),
        ({**STRING_CHECK, "name": "only"}, ["only"]),
    ],
)
def test_multi_graders_may_be_a_dict_a_list_or_one(graders: Any, names: list[str]) -> None:
    grader = parse_grader({"type": "multi", "graders": graders, "calculate_output": "+".join(names)})
    assert isinstance(grader, MultiGrader)
    assert list(grader.graders) == names


JUDGE = {"type": "score_model", "base_url": "https://host/v1", "model": "m", "input": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize("content", ["x", {"type": "input_text", "text": "x"}, [{"type": "input_text", "text": "x"}]])
def test_content_of_a_judges_message_may_be_a_text_a_part_or_parts(content: Any) -> None:
    grader = parse_grader({**JUDGE, "input": [{"role": "user", "content": content}]})
    assert isinstance(grader, ScoreModelGrader)
    assert [part.model_dump() for part in grader.input[0].content] == [{"type": "input_text", "text": "x"}]
    assert (grader.range, grader.sampling_params) == ((0.0, 1.0), SamplingParams())


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": [{"role": "user", "content": []}]}, "grader.input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "grader.input.0.content.0.text"),
        ({"input": [{"role": "user", "content": [{"type": "input_film", "text": "x"}]}]}, "grader.input.0.content.0"),
        ({"input": [{"role": "user"}]}, "grader.input.0.content"),
        ({"base_url": "judge.example.com"}, "grader.base_url"),
        ({"range": [0]}, "grader.range"),
        ({"type": "label_model", "labels": []}, "grader.labels"),
    ],
)
def test_wrong_field_of_a_judge_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_grader({**JUDGE, **changes})
    assert caught.value.param == param


@pytest.mark.parametrize(
    "grader",
    [
        {"type": "endpoint", "url": "https://x.example/", "timeout_seconds": {"headers": {"authorization": "hush"}}},
        {"type": "endpoint", "url": [{"api_key": "hush"}]},
        {"type": "multi", "graders": [["hush"]], "calculate_output": "a"},
        {"type": {"api_key": "hush"}},
        {"type": ["hush"]},
    ],
)
def test_what_came_is_not_repeated_where_it_may_hold_a_secret(grader: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_grader(grader)
    assert "hush" not in caught.value.message


def test_wrong_grader_in_a_list_names_its_own_field() -> None:
    graders = [{**STRING_CHECK, "name": "a"}, {**STRING_CHECK, "name": "b", "inptu": ""}]
    with pytest.raises(InvalidRequest) as caught:
        parse_grader({"type": "multi", "graders": graders, "calculate_output": "a"})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "grader.graders.b.inptu")


def test_registered_endpoint_is_told_from_an_inline_one() -> None:
    assert isinstance(parse_grader({"type": "endpoint", "grader_id": "grader_1"}), RegisteredEndpointGrader)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("x", "grader"),
        ({"type": "wat"}, "grader.type"),
        ({**STRING_CHECK, "operation": "neq"}, "grader.operation"),
        ({"type": "endpoint", "url": "ftp://host/"}, "grader.url"),
        ({"type": "endpoint", "url": "https://host/", "pass_threshold": float("inf")}, "grader.pass_threshold"),
        ({"type": "multi", "graders": {"a": {"type": "multi"}}, "calculate_output": "a"}, "grader.graders.a.type"),
        ({"type": "multi", "graders": {"a": {**STRING_CHECK, "inptu": ""}}, "calculate_output": "a"}, "grader.graders.a.inptu"),
        ({"type": "python", "source": "x" * 256_001}, "grader.source"),
    ],
)
def test_wrong_grader_names_its_own_field(raw: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_grader(raw)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "Line 7 is not JSON"),
        (b"[]", "Line 7 must be a JSON object"),
        (b'{"prompt": "x"}', "Line 7, 'messages'"),
        (b'{"messages": []}', "Line 7, 'messages'"),
        (b'{"messages": [{"role": "user", "content": "  "}]}', "Line 7: the prompt is empty"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "Line 7: the last message must be from 'user'"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "Line 7, 'messages.0.role'"),
        (b"[" * 100_000, "Line 7 is not JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "answer": NaN}', "Line 7 is not JSON: NaN"),
    ],
)
def test_bad_row_is_refused_with_its_line(line: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_row(line, 7, "training_file")
    assert message in caught.value.message
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "training_file")


def test_row_keeps_every_other_key_for_the_grader() -> None:
    row = parse_row(b'{"messages": [{"role": "user", "content": "2+2?"}], "answer": 4, "meta": {"level": "easy"}}', 1, "training_file")
    assert (row.item["answer"], row.item["meta"]) == (4, {"level": "easy"})
