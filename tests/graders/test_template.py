from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.grader_specs import StringCheckGrader
from core.specs import parse_grader
from graders.template import check_syntax, check_templates, render, template_variables

ITEM: dict[str, Any] = {
    "answer": "42",
    "n": 7,
    "half": 0.5,
    "yes": True,
    "none": None,
    "deep": {"list": [{"x": "first"}, ["a", "b"]]},
    "a-b": "dash",
}
SAMPLE = {"output_text": "the text", "output_json": {"steps": [1, 2]}, "output_tools": [], "choices": [{"index": 0}]}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain { text } }}", "plain { text } }}"),
        ("{{item.answer}}", "42"),
        ("{{ item.answer }} = {{sample.output_text}}", "42 = the text"),
        ("{{ item.deep.list[0].x }}", "first"),
        ("{{ item.deep.list.1.0 }}", "a"),
        ("{{ item.deep.list[1] }}", '["a", "b"]'),
        ("{{ sample.output_json.steps[1] }}", "2"),
        ("{{ item.n }} {{ item.half }} {{ item.yes }} {{ item.none }}", "7 0.5 true null"),
        ("{{ item.a-b }}", "dash"),
    ],
)
def test_template_is_filled(template: str, text: str) -> None:
    assert render(template, ITEM, SAMPLE) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ item.missing }}",
        "{{ item.deep.list[2] }}",
        "{{ item.answer.x }}",
        "{{ item.answer[0] }}",
        "{{ item }}",
        "{{ sample.nothing }}",
        "{{ other.answer }}",
        "{{ answer }}",
        "{{ item.answer | upper }}",
        "{{ item.answer + 1 }}",
        "{{}}",
        "{{{{item.n}}}}",
        "{{ item.deep.list[-1] }}",
        "{{ item.__class__ }}",
        "{{ item..answer }}",
    ],
)
def test_variable_that_is_not_there_is_an_error_with_the_contracts_code(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(template, ITEM, SAMPLE)
    assert caught.value.code == "invalid_variable_error"


@given(st.text())
def test_what_is_filled_in_is_not_read_as_a_template_again(text: str) -> None:
    hostile = "{{ item.secret }}" + text
    assert render("<{{ sample.output_text }}>", {"secret": "s"}, {"output_text": hostile}) == f"<{hostile}>"


def test_variables_are_listed_in_order() -> None:
    assert template_variables("{{ item.b }} and {{item.a[0]}} and {{sample.output_text}}") == ["item.b", "item.a[0]", "sample.output_text"]


def string_check(**changes: str) -> StringCheckGrader:
    fields = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq", **changes}
    return StringCheckGrader.model_validate(fields)


def test_a_row_that_lacks_a_column_is_named_with_line_and_field() -> None:
    check_templates(string_check(), {"answer": "1"}, 4)
    with pytest.raises(InvalidRequest, match=r"Line 4: .*item\.answer") as caught:
        check_templates(string_check(), {"other": "1"}, 4, param="method.reinforcement.grader")
    assert caught.value.param == "method.reinforcement.grader.reference"
    assert caught.value.code == "invalid_variable_error"


def test_members_of_a_multi_grader_are_checked_too() -> None:
    raw = {"type": "multi", "graders": {"first": string_check(reference="{{item.gold}}").model_dump()}, "calculate_output": "first"}
    with pytest.raises(InvalidRequest) as caught:
        check_templates(parse_grader(raw), {"answer": "1"}, 1)
    assert caught.value.param == "grader.graders.first.reference"


@pytest.mark.parametrize(
    "content",
    [
        "{{ item.gold }}",
        [{"type": "input_text", "text": "x"}, {"type": "output_text", "text": "{{ item.gold }}"}],
        {"type": "input_image", "image_url": "{{ item.gold }}"},
        {"type": "input_audio", "input_audio": {"data": "{{ item.gold }}", "format": "wav"}},
    ],
)
def test_every_text_that_a_judge_is_sent_is_checked_against_the_rows(content: Any) -> None:
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": content}]
    judge = parse_grader({"type": "score_model", "base_url": "https://example.com/v1", "model": "judge-1", "input": messages})
    check_templates(judge, {"gold": "1"}, 2)
    with pytest.raises(InvalidRequest, match=r"Line 2: .*item\.gold") as caught:
        check_templates(judge, {"answer": "1"}, 2)
    assert (caught.value.code, caught.value.param) == ("invalid_variable_error", "grader.input.1.content")


@pytest.mark.parametrize("template", ["{{ itm.answer }}", "{{ sample.text }}", "{{ item }}"])
def test_a_variable_that_no_row_could_have_is_refused_without_a_row(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_syntax(string_check(input=template))
    assert (caught.value.code, caught.value.param) == ("invalid_variable_error", "grader.input")


def test_output_json_needs_a_response_format() -> None:
    spec = string_check(input="{{ sample.output_json.x }}")
    check_syntax(spec, has_response_format=True)
    with pytest.raises(InvalidRequest, match="response_format"):
        check_syntax(spec, has_response_format=False)
