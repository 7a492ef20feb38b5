"""A grade in the shape of `POST /fine_tuning/alpha/graders/run`: a failed grade is an answer with a flag, not an HTTP error."""

from typing import Any

from graders.grade import Grade, GradeFailure

PROGRAM_FAILURES = frozenset(
    {GradeFailure.PYTHON_RUNTIME, GradeFailure.PYTHON_UNSUPPORTED, GradeFailure.PYTHON_TIMEOUT, GradeFailure.PYTHON_MEMORY}
)
ENDPOINT_OUTAGES = frozenset({GradeFailure.TIMEOUT, GradeFailure.CONNECTION, GradeFailure.HTTP})
OWN_FLAG = PROGRAM_FAILURES | ENDPOINT_OUTAGES | {GradeFailure.PYTHON_SERVER, GradeFailure.FORMULA_PARSE, GradeFailure.INVALID_VARIABLE}


def run_result(grade: Grade, *, name: str, kind: str) -> dict[str, Any]:
    """The body of the answer. `reward` is null when the grade failed or abstained: there is no number to give."""
    return {
        "reward": grade.reward,
        "sub_rewards": grade.sub_scores,
        "model_grader_token_usage_per_model": {},
        "metadata": {
            "name": name,
            "type": kind,
            "execution_time": grade.latency_seconds,
            "scores": {name: grade.reward} if grade.reward is not None else {},
            "token_usage": None,
            "sampled_model_name": None,
            "explanation": grade.explanation,
            "abstained": grade.abstained,
            "attempts": grade.attempts,
            "error": None if grade.error is None else {"code": grade.error, "message": grade.error_message},
            "errors": error_flags(grade),
        },
    }


def error_flags(grade: Grade) -> dict[str, bool | str | None]:
    """The fourteen keys of the wire contract, from the one code of ours."""
    error = grade.error
    is_program, is_server = error in PROGRAM_FAILURES, error == GradeFailure.PYTHON_SERVER
    return {
        "formula_parse_error": error == GradeFailure.FORMULA_PARSE,
        "sample_parse_error": False,
        "truncated_observation_error": False,
        "unresponsive_reward_error": error in ENDPOINT_OUTAGES,
        "invalid_variable_error": error == GradeFailure.INVALID_VARIABLE,
        "other_error": error is not None and error not in OWN_FLAG,
        "python_grader_server_error": is_server,
        "python_grader_server_error_type": grade.error_message if is_server else None,
        "python_grader_runtime_error": is_program,
        "python_grader_runtime_error_details": grade.error_message if is_program else None,
        "model_grader_server_error": False,
        "model_grader_server_error_details": None,
        "model_grader_refusal_error": False,
        "model_grader_parse_error": False,
    }
