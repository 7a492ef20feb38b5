"""1 when one text stands in a relation to another, else 0."""

from collections.abc import Callable

from core.grader_specs import StringCheckGrader as StringCheckSpec
from graders.grade import Grade, GradeRequest
from graders.template import InvalidVariable, render, ungradable

OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


class StringCheckGrader:
    def __init__(self, spec: StringCheckSpec) -> None:
        self._spec = spec
        self._holds = OPERATIONS[spec.operation]

    async def grade(self, request: GradeRequest) -> Grade:
        try:
            text = render(self._spec.input, request.item, request.sample)
            reference = render(self._spec.reference, request.item, request.sample)
        except InvalidVariable as error:
            return ungradable(error)
        return Grade(1.0 if self._holds(text, reference) else 0.0)

    async def close(self) -> None:
        """Holds nothing."""
