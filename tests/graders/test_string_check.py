from typing import Any

import pytest

from core.grader_specs import StringCheckGrader as Spec
from graders.string_check import StringCheckGrader
from tests.graders.helpers import grade, request


def checked(operation: Any, text: str, reference: str) -> float | None:
    spec = Spec(type="string_check", input="{{sample.output_text}}", reference="{{item.answer}}", operation=operation)
    return grade(StringCheckGrader(spec), request(text, item={"answer": reference})).reward


@pytest.mark.parametrize(
    ("operation", "text", "reference", "reward"),
    [
        ("eq", "4", "4", 1.0),
        ("eq", "4 ", "4", 0.0),
        ("eq", "A", "a", 0.0),
        ("ne", "4", "4", 0.0),
        ("ne", "5", "4", 1.0),
        ("like", "the answer is Paris.", "Paris", 1.0),
        ("like", "the answer is Paris.", "paris", 0.0),
        ("like", "Par", "Paris", 0.0),
        ("ilike", "the answer is PARIS.", "paris", 1.0),
        ("ilike", "STRASSE", "straße", 1.0),
        ("ilike", "London", "paris", 0.0),
        ("like", "a%b", "%", 1.0),
        ("like", "ab", "%", 0.0),
    ],
)
def test_operation(operation: str, text: str, reference: str, reward: float) -> None:
    assert checked(operation, text, reference) == reward


def test_missing_column_is_a_failed_grade_not_a_zero() -> None:
    spec = Spec(type="string_check", input="{{sample.output_text}}", reference="{{item.gold}}", operation="ne")
    result = grade(StringCheckGrader(spec))
    assert (result.reward, result.error) == (None, "invalid_variable_error")
    assert "item.gold" in (result.error_message or "")


@pytest.mark.parametrize("operation", ["eq", "ne"])
@pytest.mark.parametrize("output_json", [None, {"other": 1}, [1]])
def test_completion_without_the_json_it_was_asked_for_is_a_wrong_answer(operation: Any, output_json: Any) -> None:
    spec = Spec(type="string_check", input="{{sample.output_json.city}}", reference="Paris", operation=operation)
    result = grade(StringCheckGrader(spec), request("not json", output_json=output_json))
    assert (result.reward, result.error) == (0.0, None)
    assert "sample.output_json.city" in (result.explanation or "")


def test_json_value_is_compared() -> None:
    spec = Spec(type="string_check", input="{{sample.output_json.cities[1]}}", reference="{{item.answer}}", operation="eq")
    sent = request("...", output_json={"cities": ["Rome", "Paris"]}, item={"answer": "Paris"})
    assert grade(StringCheckGrader(spec), sent).reward == 1.0
