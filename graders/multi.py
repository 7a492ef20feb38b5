"""One grade from a formula over others. A member that failed makes the whole grade failed: no number is put in its place."""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace

from graders.formula import FormulaValueError, parse_formula
from graders.grade import MAX_EXPLANATION_CHARACTERS, Grade, GradeFailure, Grader, GradeRequest, add_usage, failed, shorten


class MultiGrader:
    def __init__(self, graders: Mapping[str, Grader], calculate_output: str) -> None:
        """Raises: FormulaError."""
        self._graders = dict(graders)
        self._formula = parse_formula(calculate_output, list(graders), param="calculate_output")

    async def grade(self, request: GradeRequest) -> Grade:
        """Members are asked at the same time. Sub-scores: each member's reward, and its own as `member.name`."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(grader.grade(_for_member(request, name))) for name, grader in self._graders.items()}
        grades = {name: task.result() for name, task in tasks.items()}
        combined = replace(
            self._combine(grades),
            sub_scores=_sub_scores(grades),
            explanation=_explanation(grades),
            attempts=max(grade.attempts for grade in grades.values()),
            latency_seconds=time.monotonic() - started,
            token_usage=add_usage(grade.token_usage for grade in grades.values()),
        )
        return combined

    async def close(self) -> None:
        for grader in self._graders.values():
            await grader.close()

    def _combine(self, grades: Mapping[str, Grade]) -> Grade:
        for name, grade in grades.items():
            if grade.error is not None:
                return replace(grade, error_message=f"Grader '{name}': {grade.error_message}", failed_member=name)
        rewards = {name: grade.reward for name, grade in grades.items() if grade.reward is not None}
        if len(rewards) < len(grades):
            return Grade(None, abstained=True)
        try:
            return Grade(self._formula.evaluate(rewards))
        except FormulaValueError as error:
            return failed(GradeFailure.FORMULA_VALUE, f"'{self._formula.text}': {error.message}")


def _for_member(request: GradeRequest, name: str) -> GradeRequest:
    """With a key of its own, since one endpoint may serve two members."""
    key = request.idempotency_key
    return replace(request, idempotency_key=hashlib.sha256(f"{key}:{name}".encode()).hexdigest() if key else "")


def _sub_scores(grades: Mapping[str, Grade]) -> dict[str, float]:
    scores = {name: grade.reward for name, grade in grades.items() if grade.reward is not None}
    nested = {f"{name}.{inner}": score for name, grade in grades.items() for inner, score in grade.sub_scores.items()}
    return {**nested, **scores}


def _explanation(grades: Mapping[str, Grade]) -> str | None:
    lines = [f"{name}: {grade.explanation}" for name, grade in grades.items() if grade.explanation]
    return shorten("\n".join(lines), MAX_EXPLANATION_CHARACTERS) if lines else None
