"""What an endpoint answered, as a grade: strict, because a number that was guessed would be trained on."""

import json
import math
from typing import Any

from core.errors import InvalidGrade
from core.redaction import Redactor
from graders.grade import MAX_EXPLANATION_CHARACTERS, Grade, GradeFailure, failed, shorten

MAX_SUB_SCORES = 64
MAX_NAME_CHARACTERS = 64

Range = tuple[float, float] | None


class _Refused(Exception):
    """The reply as a whole cannot be used."""

    def __init__(self, failure: GradeFailure, message: str) -> None:
        self.grade = failed(failure, message)


def parse_reply(body: bytes, reward_range: Range, redactor: Redactor) -> Grade:
    """The grade in a reply of format `single`: {"score", "sub_scores"?, "explanation"?}; a null score abstains."""
    try:
        return _grade(_load(body, redactor), reward_range, redactor)
    except _Refused as refused:
        return refused.grade


def parse_results(body: bytes, ids: list[str], reward_range: Range, redactor: Redactor) -> list[Grade]:
    """The grades of `ids`, in their order, in a reply of format `batch`: {"results": [{"id", "score", ...}]}.

    Each id must come exactly once: where they do not, nothing says which score belongs to which completion, and all have failed.
    """
    try:
        results = _by_id(_list_in(_load(body, redactor), "results", len(ids)), set(ids))
    except _Refused as refused:
        return [refused.grade] * len(ids)
    return [_grade(results[id_], reward_range, redactor) for id_ in ids]


def parse_rewards(body: bytes, ids: list[str], reward_range: Range, redactor: Redactor) -> list[Grade]:
    """The grades of `ids` in a reply of format `openrlhf`: {"rewards": [number, ...]}, in the same order."""
    try:
        rewards = _list_in(_load(body, redactor), "rewards", len(ids))
    except _Refused as refused:
        return [refused.grade] * len(ids)
    return [_grade({"score": reward}, reward_range, redactor) for reward in rewards]


def _load(body: bytes, redactor: Redactor) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        excerpt = redactor.clean(body[:4096].decode(errors="replace"))
        raise _Refused(GradeFailure.INVALID_JSON, f"The reply is not JSON: {shorten(excerpt, 200)!r}.") from None


def _list_in(reply: Any, name: str, count: int) -> list[Any]:
    found = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(found, list):
        raise _Refused(GradeFailure.INVALID_SCORE, f"The reply must be an object with a list '{name}'.")
    if len(found) != count:
        raise _Refused(GradeFailure.WRONG_COUNT, f"'{name}' has {len(found)} entries for {count} completions.")
    return found


def _by_id(results: list[Any], ids: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for position, result in enumerate(results):
        id_ = result.get("id") if isinstance(result, dict) else None
        if not isinstance(id_, str):
            raise _Refused(GradeFailure.MISSING_ID, f"results[{position}] has no 'id'.")
        if id_ not in ids:
            raise _Refused(GradeFailure.UNKNOWN_ID, f"results[{position}] has an 'id' that was not sent.")
        if id_ in found:
            raise _Refused(GradeFailure.DUPLICATE_ID, f"'results' has the id {id_} twice.")
        found[id_] = result
    return found


def _grade(reply: Any, reward_range: Range, redactor: Redactor) -> Grade:
    if not isinstance(reply, dict) or "score" not in reply:
        return failed(GradeFailure.INVALID_SCORE, "The reply must be an object with a 'score'.")
    try:
        reward = None if reply["score"] is None else finite_number(reply["score"], "score")
        sub_scores = _sub_scores(reply.get("sub_scores"), redactor)
        explanation = _explanation(reply.get("explanation"), redactor)
    except InvalidGrade as error:
        return failed(GradeFailure.INVALID_SCORE, error.message)
    if reward is not None and reward_range is not None and not reward_range[0] <= reward <= reward_range[1]:
        low, high = reward_range
        return failed(GradeFailure.OUT_OF_RANGE, f"'score' is {reward:g}, outside the reward range {low:g} to {high:g}.")
    return Grade(reward, sub_scores=sub_scores, explanation=explanation, abstained=reward is None)


def finite_number(value: Any, what: str) -> float:
    """`value` as a float. Raises: InvalidGrade for a bool, a string, NaN, infinity and everything else that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidGrade(f"'{what}' must be a number, not {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidGrade(f"'{what}' must be finite, not {'NaN' if math.isnan(number) else 'infinite'}.")
    return number


def _sub_scores(value: Any, redactor: Redactor) -> dict[str, float]:
    """{name: number}; a null number is one that the grader did not compute."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidGrade(f"'sub_scores' must be an object, not {type(value).__name__}.")
    if len(value) > MAX_SUB_SCORES:
        raise InvalidGrade(f"'sub_scores' has {len(value)} entries, more than {MAX_SUB_SCORES}.")
    names = {name: shorten(redactor.clean(name), MAX_NAME_CHARACTERS) for name in value}
    return {names[name]: finite_number(number, f"sub_scores.{names[name]}") for name, number in value.items() if number is not None}


def _explanation(value: Any, redactor: Redactor) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidGrade(f"'explanation' must be a string, not {type(value).__name__}.")
    return shorten(redactor.clean(value), MAX_EXPLANATION_CHARACTERS)
