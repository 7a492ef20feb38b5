"""A grade in the shape of `POST /fine_tuning/alpha/graders/run`: a failed grade is an answer with a flag, not an HTTP error."""

from typing import Any

from graders.grade import Grade, GradeFailure, add_usage

PROGRAM_FAILURES = frozenset(
    {GradeFailure.PYTHON_RUNTIME, GradeFailure.PYTHON_UNSUPPORTED, GradeFailure.PYTHON_TIMEOUT, GradeFailure.PYTHON_MEMORY}
)
OUTAGES = frozenset({GradeFailure.TIMEOUT, GradeFailure.CONNECTION, GradeFailure.HTTP})
JUDGE_OUTAGES = OUTAGES | {GradeFailure.INVALID_JSON}


def run_result(grade: Grade, *, name: str, kind: str, lacks_json: bool = False) -> dict[str, Any]:
    """The body of the answer. `reward` is null when the grade failed or abstained: there is no number to give.

    `lacks_json`: the grader looks at `sample.output_json` and the text is no JSON.
    """
    return {
        "reward": grade.reward,
        "sub_rewards": grade.sub_scores,
        "model_grader_token_usage_per_model": grade.token_usage,
        "metadata": {
            "name": name,
            "type": kind,
            "execution_time": grade.latency_seconds,
            "scores": {name: grade.reward} if grade.reward is not None else {},
            "token_usage": total_usage(grade),
            "sampled_model_name": grade.model,
            "explanation": grade.explanation,
            "abstained": grade.abstained,
            "attempts": grade.attempts,
            "error": None if grade.error is None else {"code": grade.error, "message": grade.error_message},
            "errors": {**error_flags(grade), "sample_parse_error": lacks_json},
        },
    }


def total_usage(grade: Grade) -> dict[str, int] | None:
    """The tokens of all judges; None where none told."""
    return add_usage({"": tokens} for tokens in grade.token_usage.values()).get("")


def error_flags(grade: Grade) -> dict[str, bool | str | None]:
    """The fourteen keys of the wire contract, from the one code of ours."""
    error, is_judge = grade.error, grade.model is not None
    flags = {
        "formula_parse_error": error == GradeFailure.FORMULA_PARSE,
        "sample_parse_error": False,
        "truncated_observation_error": False,
        "unresponsive_reward_error": error in OUTAGES and not is_judge,
        "invalid_variable_error": error == GradeFailure.INVALID_VARIABLE,
        "python_grader_server_error": error == GradeFailure.PYTHON_SERVER,
        "python_grader_runtime_error": error in PROGRAM_FAILURES,
        "model_grader_server_error": error in JUDGE_OUTAGES and is_judge,
        "model_grader_refusal_error": error == GradeFailure.MODEL_REFUSAL,
        "model_grader_parse_error": error == GradeFailure.MODEL_PARSE or (error == GradeFailure.OUT_OF_RANGE and is_judge),
    }
    return {
        **flags,
        "other_error": error is not None and not any(flags.values()),
        "python_grader_server_error_type": grade.error_message if flags["python_grader_server_error"] else None,
        "python_grader_runtime_error_details": grade.error_message if flags["python_grader_runtime_error"] else None,
        "model_grader_server_error_details": grade.error_message if flags["model_grader_server_error"] else None,
    }
