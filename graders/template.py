"""Templates of graders: `{{ item.x.y[0] }}` and `{{ sample.output_text }}`, filled from one dataset row and one completion.

A variable that is missing is an error, not an empty text. What is filled in is never read as a template again.
"""

import json
import re
from typing import Any

from core.errors import InvalidRequest
from core.grader_specs import (
    GraderSpec,
    JudgeOptions,
    MultiGrader,
    PinnedGraderSpec,
    PinnedMultiGrader,
    RewardModelGrader,
    StringCheckGrader,
    TextSimilarityGrader,
)
from core.judge_specs import AudioPart, ImagePart, JudgeMessage
from graders.grade import Grade, GradeFailure, failed

SAMPLE_VARIABLES = frozenset({"output_text", "output_json", "output_tools", "choices"})
_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_VARIABLE = re.compile(r"(item|sample)((?:\.[^\s.\[\]{}]+|\[\d{1,6}\])+)")
_STEP = re.compile(r"\.([^\s.\[\]{}]+)|\[(\d{1,6})\]")


class InvalidVariable(InvalidRequest):
    code = "invalid_variable_error"

    def __init__(self, message: str, variable: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.variable = variable


def render(template: str, item: dict[str, Any], sample: dict[str, Any]) -> str:
    """`template` with every variable replaced: strings as they are, everything else as JSON. Raises: InvalidVariable."""
    return _PLACEHOLDER.sub(lambda match: _as_text(lookup(match[1].strip(), item, sample)), template)


def ungradable(error: InvalidVariable, worst: float = 0.0) -> Grade:
    """The grade where a template cannot be filled: the `worst` reward if the completion lacks the JSON it was asked for, else a failure."""
    if error.variable.startswith("sample.output_json"):
        # A wrong answer, not a broken grader.
        return Grade(worst, explanation=f"The completion lacks '{error.variable}'.")
    return failed(GradeFailure.INVALID_VARIABLE, error.message)


def template_variables(template: str) -> list[str]:
    """The variables that `template` names, in order. Raises: InvalidVariable for one that no row could ever have."""
    variables = [match[1].strip() for match in _PLACEHOLDER.finditer(template)]
    for variable in variables:
        _steps(variable)
    return variables


def lookup(variable: str, item: dict[str, Any], sample: dict[str, Any]) -> Any:
    """The value of `variable`. Raises: InvalidVariable naming the first part that is missing."""
    steps = _steps(variable)
    value: Any = item if variable.startswith("item") else sample
    for step in steps:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise InvalidVariable(f"'{variable}' is missing: there is no '{step}'.", variable)
    return value


def check_syntax(spec: GraderSpec | PinnedGraderSpec, param: str = "grader", *, has_response_format: bool = True) -> None:
    """What can be said of the templates of `spec` without a row. Raises: InvalidVariable naming the grader's field."""
    for field, template in _templates(spec, param):
        try:
            variables = template_variables(template)
        except InvalidVariable as error:
            raise InvalidVariable(f"'{field}': {error.message}", error.variable, param=field) from error
        for variable in variables:
            if variable.startswith("sample.output_json") and not has_response_format:
                message = f"'{field}' names '{variable}', which needs 'response_format' in the job."
                raise InvalidVariable(message, variable, param=field)


def names_output_json(spec: GraderSpec | PinnedGraderSpec) -> bool:
    """Whether a template of `spec` looks at the completion as JSON."""
    variables = [variable for _, template in _templates(spec, "") for variable in template_variables(template)]
    return any(variable.startswith("sample.output_json") for variable in variables)


def check_templates(spec: GraderSpec | PinnedGraderSpec, item: dict[str, Any], line: int, param: str = "grader") -> None:
    """That the row on `line` has every `item` variable that `spec` names. Raises: InvalidVariable naming field and line."""
    for field, template in _templates(spec, param):
        for variable in template_variables(template):
            if not variable.startswith("item"):
                continue
            try:
                lookup(variable, item, {})
            except InvalidVariable as error:
                message = f"Line {line}: {error.message} The grader's '{field}' needs it."
                raise InvalidVariable(message, variable, param=field) from error


def _templates(spec: GraderSpec | PinnedGraderSpec, param: str) -> list[tuple[str, str]]:
    """(path of the field, template) of every template in `spec`."""
    if isinstance(spec, MultiGrader | PinnedMultiGrader):
        return [pair for name, member in spec.graders.items() for pair in _templates(member, f"{param}.graders.{name}")]
    if isinstance(spec, StringCheckGrader | TextSimilarityGrader):
        return [(f"{param}.input", spec.input), (f"{param}.reference", spec.reference)]
    if isinstance(spec, JudgeOptions):
        return [(f"{param}.input.{number}.content", text) for number, message in enumerate(spec.input) for text in _texts(message)]
    if isinstance(spec, RewardModelGrader):
        if isinstance(spec.input, str):
            return [(f"{param}.input", spec.input)]
        return [(f"{param}.input.{number}.content", message.content) for number, message in enumerate(spec.input)]
    return []


def _texts(message: JudgeMessage) -> list[str]:
    return [
        part.image_url if isinstance(part, ImagePart) else part.input_audio.data if isinstance(part, AudioPart) else part.text
        for part in message.content
    ]


def _steps(variable: str) -> list[str]:
    """The keys and indices behind `item` or `sample`."""
    match = _VARIABLE.fullmatch(variable)
    if match is None:
        raise InvalidVariable(f"'{variable}' is not a variable: write item.key or sample.output_text.", variable)
    steps = [key or index for key, index in _STEP.findall(match[2])]
    if match[1] == "sample" and steps[0] not in SAMPLE_VARIABLES:
        raise InvalidVariable(f"'{variable}' does not exist: 'sample' has {', '.join(sorted(SAMPLE_VARIABLES))}.", variable)
    return steps


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
