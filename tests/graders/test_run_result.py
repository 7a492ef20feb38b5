from dataclasses import replace

import pytest
from openai.types.fine_tuning.alpha import GraderRunResponse

from graders.grade import Grade, GradeFailure, failed
from graders.run_result import error_flags, run_result

FLAG = {
    GradeFailure.FORMULA_PARSE: "formula_parse_error",
    GradeFailure.INVALID_VARIABLE: "invalid_variable_error",
    GradeFailure.PYTHON_RUNTIME: "python_grader_runtime_error",
    GradeFailure.PYTHON_UNSUPPORTED: "python_grader_runtime_error",
    GradeFailure.PYTHON_TIMEOUT: "python_grader_runtime_error",
    GradeFailure.PYTHON_MEMORY: "python_grader_runtime_error",
    GradeFailure.PYTHON_SERVER: "python_grader_server_error",
    GradeFailure.TIMEOUT: "unresponsive_reward_error",
    GradeFailure.CONNECTION: "unresponsive_reward_error",
    GradeFailure.HTTP: "unresponsive_reward_error",
    GradeFailure.MODEL_REFUSAL: "model_grader_refusal_error",
    GradeFailure.MODEL_PARSE: "model_grader_parse_error",
}
JUDGE_FLAG = FLAG | {
    GradeFailure.TIMEOUT: "model_grader_server_error",
    GradeFailure.CONNECTION: "model_grader_server_error",
    GradeFailure.HTTP: "model_grader_server_error",
    GradeFailure.INVALID_JSON: "model_grader_server_error",
    GradeFailure.OUT_OF_RANGE: "model_grader_parse_error",
}


def test_a_good_grade_is_what_the_openai_client_expects() -> None:
    result = run_result(Grade(0.75, sub_scores={"a": 1.0}, latency_seconds=0.5), name="mine", kind="multi")
    parsed = GraderRunResponse.model_validate(result, strict=True)
    assert (parsed.reward, parsed.sub_rewards, parsed.metadata.name, parsed.metadata.type) == (0.75, {"a": 1.0}, "mine", "multi")
    assert parsed.metadata.execution_time == 0.5
    assert parsed.metadata.errors.model_extra == {}
    assert set(result["metadata"]["errors"]) == {field.alias or name for name, field in type(parsed.metadata.errors).model_fields.items()}
    assert not any(result["metadata"]["errors"].values())


@pytest.mark.parametrize("failure", list(GradeFailure))
def test_every_failure_raises_exactly_one_flag_and_no_number(failure: GradeFailure) -> None:
    result = run_result(failed(failure, "the reason"), name="mine", kind="python")
    flags = result["metadata"]["errors"]
    assert [name for name, value in flags.items() if value is True] == [FLAG.get(failure, "other_error")]
    assert result["reward"] is None
    assert result["metadata"]["error"] == {"code": failure.value, "message": "the reason"}


@pytest.mark.parametrize("failure", list(GradeFailure))
def test_every_failure_of_a_judge_raises_exactly_one_flag_too(failure: GradeFailure) -> None:
    flags = error_flags(replace(failed(failure, "the reason"), model="judge-1"))
    assert [name for name, value in flags.items() if value is True] == [JUDGE_FLAG.get(failure, "other_error")]
    details = flags["model_grader_server_error_details"]
    assert details == ("the reason" if flags["model_grader_server_error"] else None)


def test_judge_and_tokens_are_shown() -> None:
    tokens = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4, "cached_tokens": 2}
    result = run_result(Grade(0.5, model="judge-1", token_usage={"judge-1": tokens}), name="mine", kind="score_model")
    assert result["model_grader_token_usage_per_model"] == {"judge-1": tokens}
    assert (result["metadata"]["sampled_model_name"], result["metadata"]["token_usage"]) == ("judge-1", tokens)


def test_details_of_a_program_are_given() -> None:
    assert error_flags(failed(GradeFailure.PYTHON_RUNTIME, "Traceback"))["python_grader_runtime_error_details"] == "Traceback"
    assert error_flags(failed(GradeFailure.PYTHON_SERVER, "no monty"))["python_grader_server_error_type"] == "no monty"
