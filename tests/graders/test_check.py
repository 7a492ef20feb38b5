import asyncio
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.specs import parse_grader
from graders.check import check_grader, check_programs
from graders.python_sandbox import SandboxLimits
from outbound.safe_http import NetworkPolicy

STRING_CHECK = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}
ENDPOINT = {"type": "endpoint", "url": "https://example.com/grade", "headers": {"authorization": "Bearer secret-value"}}
PYTHON = {"type": "python", "source": "def grade(sample, item):\n    return 1.0"}

SIMILAR = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "evaluation_metric": "bleu"}
JUDGE = {
    "type": "score_model",
    "base_url": "https://example.com/v1",
    "api_key": "secret-value",
    "model": "judge-1",
    "input": [{"role": "user", "content": "{{sample.output_text}}"}],
}
LABEL = {**JUDGE, "type": "label_model", "labels": ["a", "b"], "passing_labels": ["a"]}


def multi(formula: str, **members: Any) -> dict[str, Any]:
    return {"type": "multi", "graders": members, "calculate_output": formula}


@pytest.mark.parametrize(
    "raw",
    [
        *(STRING_CHECK, ENDPOINT, PYTHON, SIMILAR, JUDGE, LABEL),
        multi("0.5 * a + b", a=STRING_CHECK, b=ENDPOINT),
        multi("a + b + c", a=SIMILAR, b=JUDGE, c=LABEL),
        {"type": "endpoint", "grader_id": "grader_a"},
    ],
)
def test_good_grader_passes(raw: dict[str, Any]) -> None:
    check_grader(parse_grader(raw), NetworkPolicy())


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        ({**STRING_CHECK, "input": "{{ output }}"}, "invalid_variable_error", "grader.input"),
        ({**ENDPOINT, "url": "https://127.0.0.1/"}, "address_refused", "grader.url"),
        ({**ENDPOINT, "url": "http://example.com/"}, "address_refused", "grader.url"),
        ({**ENDPOINT, "url": "https://me:secret-value@example.com/"}, "address_refused", "grader.url"),
        ({**ENDPOINT, "headers": {"host": "secret-value"}}, "invalid_value", "grader.headers.host"),
        ({**ENDPOINT, "headers": {"x-a": "secret-value\n"}}, "invalid_value", "grader.headers.x-a"),
        ({**SIMILAR, "reference": "{{ nothing }}"}, "invalid_variable_error", "grader.reference"),
        ({**JUDGE, "base_url": "https://127.0.0.1/v1"}, "address_refused", "grader.base_url"),
        ({**JUDGE, "base_url": "http://example.com/v1"}, "address_refused", "grader.base_url"),
        ({**JUDGE, "base_url": "https://me:secret-value@example.com/v1"}, "address_refused", "grader.base_url"),
        ({**JUDGE, "input": [{"role": "user", "content": "{{ x }}"}]}, "invalid_variable_error", "grader.input.0.content"),
        (
            {**LABEL, "input": [{"role": "user", "content": {"type": "input_image", "image_url": "{{ x }}"}}]},
            "invalid_variable_error",
            "grader.input.0.content",
        ),
        (multi("a", a={**JUDGE, "base_url": "https://10.0.0.1/v1"}), "address_refused", "grader.graders.a.base_url"),
        (multi("a +", a=STRING_CHECK), "formula_parse_error", "grader.calculate_output"),
        (multi("a + b", a=STRING_CHECK), "formula_parse_error", "grader.calculate_output"),
        (multi("a", a={**STRING_CHECK, "reference": "{{x}}"}), "invalid_variable_error", "grader.graders.a.reference"),
        (multi("a", a={**ENDPOINT, "url": "https://10.0.0.1/"}), "address_refused", "grader.graders.a.url"),
    ],
)
def test_bad_grader_is_refused_with_code_and_field(raw: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_grader(parse_grader(raw), NetworkPolicy())
    assert (caught.value.code, caught.value.param) == (code, param)
    assert "secret-value" not in caught.value.message


def test_programs_are_loaded_in_the_sandbox_also_inside_multi() -> None:
    limits = SandboxLimits(seconds=1.0, num_processes=1)
    asyncio.run(check_programs(parse_grader(multi("a", a=PYTHON)), limits=limits))
    bad = multi("a + b", a=PYTHON, b={**PYTHON, "source": "def grade(sample, item) return 1"})
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(check_programs(parse_grader(bad), limits=limits))
    assert caught.value.param == "grader.graders.b.source"
