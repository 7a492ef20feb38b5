"""What goes into a grader and what comes out. A grade that failed has no reward: `error` says why, and nothing stands in its place."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

MAX_EXPLANATION_CHARACTERS = 4_000
MAX_MESSAGE_CHARACTERS = 2_000


class GradeFailure(StrEnum):
    """The stable codes of `Grade.error`, each counted by itself."""

    TIMEOUT = "grader_timeout"
    CONNECTION = "grader_connection_error"
    ADDRESS_REFUSED = "grader_address_refused"
    HTTP = "grader_http_error"
    RESPONSE_TOO_LARGE = "grader_response_too_large"
    REQUEST_INVALID = "grader_request_invalid"
    INVALID_JSON = "grader_invalid_json"
    INVALID_SCORE = "grader_invalid_score"
    OUT_OF_RANGE = "grader_score_out_of_range"
    WRONG_COUNT = "grader_wrong_count"
    DUPLICATE_ID = "grader_duplicate_id"
    UNKNOWN_ID = "grader_unknown_id"
    MISSING_ID = "grader_missing_id"
    LIMITS_UNAVAILABLE = "grader_limits_unavailable"
    INVALID_VARIABLE = "invalid_variable_error"
    FORMULA_PARSE = "formula_parse_error"
    FORMULA_VALUE = "formula_value_error"
    PYTHON_RUNTIME = "python_grader_runtime_error"
    PYTHON_UNSUPPORTED = "python_grader_unsupported"
    PYTHON_TIMEOUT = "python_grader_timeout"
    PYTHON_MEMORY = "python_grader_out_of_memory"
    PYTHON_SERVER = "python_grader_server_error"
    MODEL_REFUSAL = "model_grader_refusal_error"
    MODEL_PARSE = "model_grader_parse_error"


OUTAGES = frozenset(
    {GradeFailure.TIMEOUT, GradeFailure.CONNECTION, GradeFailure.HTTP, GradeFailure.LIMITS_UNAVAILABLE, GradeFailure.PYTHON_SERVER}
)
"""Failures of the grader's surroundings, which waiting may heal; the others will come again with the same completion."""


@dataclass(frozen=True)
class GradeRequest:
    """One completion to grade, with the dataset row it answers."""

    item: dict[str, Any]
    output_text: str
    output_json: Any | None = None
    """The completion parsed as JSON where the job has a `response_format`, else None."""

    finish_reason: str = "stop"
    trace_id: str = ""
    idempotency_key: str = ""
    """SHA-256 in hex of (job, phase, step, prompt, g, grader version, completion): the same for every retry of the same grade."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """job_id, step, attempt, grader_version: passed on to endpoints."""

    @property
    def sample(self) -> dict[str, Any]:
        """`sample` of the wire contract: what templates, programs and endpoints see of the completion."""
        message = {"role": "assistant", "content": self.output_text, "tool_calls": []}
        return {
            "output_text": self.output_text,
            "output_json": self.output_json,
            "output_tools": [],
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish_reason}],
        }


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion: a finite `reward`, or `abstained`, or an `error`; exactly one of the three."""

    reward: float | None
    sub_scores: dict[str, float] = field(default_factory=dict)
    explanation: str | None = None
    error: str | None = None
    """A value of GradeFailure."""

    error_message: str | None = None
    """For the job's owner. Holds no header and no secret; what it quotes from outside is cut short."""

    attempts: int = 1
    latency_seconds: float = 0.0
    """From the first attempt to the verdict, without waiting for a free place in the queue."""

    abstained: bool = False
    """The grader answered `"score": null`: the sample is left out; neither an error nor a 0."""

    was_refused: bool = False
    """The service answered with a status that a second attempt would meet again, such as 404 or 422."""

    failed_member: str | None = None
    """Of a multi grade: the member that made it fail."""

    model: str | None = None
    """The judge that was asked; of a multi grade, the judge that made it fail."""

    token_usage: dict[str, dict[str, int]] = field(default_factory=dict)
    """{a judge's model: {"prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens"}}, as far as the judges told."""

    @property
    def is_outage(self) -> bool:
        return self.error in OUTAGES and not self.was_refused


class Grader(Protocol):
    async def grade(self, request: GradeRequest) -> Grade:
        """Never raises for a grader that fails: the Grade carries the error. Cancellation passes through and frees what is held."""
        ...

    async def close(self) -> None:
        """Frees connections and processes. A closed grader is not used again."""
        ...


def idempotency_key(*, job_id: str, phase: str, step: int, prompt_index: int, g: int, grader_version: str, completion: str) -> str:
    """The same for every attempt at the same grade, also after a restart; in hex."""
    parts = json.dumps([job_id, phase, step, prompt_index, g, grader_version, completion])
    return hashlib.sha256(parts.encode()).hexdigest()


def failed(failure: GradeFailure, message: str, *, attempts: int = 1, latency_seconds: float = 0.0) -> Grade:
    return Grade(
        reward=None,
        error=failure.value,
        error_message=shorten(message, MAX_MESSAGE_CHARACTERS),
        attempts=attempts,
        latency_seconds=latency_seconds,
    )


def add_usage(usages: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The tokens of several grades, by model."""
    totals: dict[str, dict[str, int]] = {}
    for usage in usages:
        for model, tokens in usage.items():
            before = totals.get(model, {})
            totals[model] = {name: before.get(name, 0) + count for name, count in tokens.items()}
    return totals


def shorten(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."
