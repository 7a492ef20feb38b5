"""`batch` and `openrlhf`: what is sent, which answer becomes whose grade, and that a mixed-up answer is nobody's."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import standardwebhooks

from graders.grade import GradeRequest
from tests.fake_endpoint import FakeEndpoint, Received, Reply, answer, hang, status
from tests.graders.helpers import SECRET, endpoint_grader, grade_all, request


def numbered(count: int, first: int = 0) -> list[GradeRequest]:
    return [request(str(number), idempotency_key=f"{number:064x}", item={"answer": number}) for number in range(first, first + count)]


def results_for(received: Received) -> list[dict[str, Any]]:
    """A right grader's: a score that says which completion it belongs to."""
    return [{"id": sample["id"], "score": float(sample["sample"]["output_text"])} for sample in received.json["samples"]]


def right(received: Received) -> Reply:
    return answer({"results": results_for(received)})


def test_a_batch_is_the_documented_shape_signed_and_named_by_its_ids() -> None:
    with FakeEndpoint(right) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch", batch_size=4), *numbered(3)))
        (received,) = endpoint.requests
    assert [grade.reward for grade in grades] == [0.0, 1.0, 2.0]
    body = received.json
    assert body.keys() == {"samples", "trace_id", "metadata"}
    assert [sample["id"] for sample in body["samples"]] == [f"{number:064x}" for number in range(3)]
    assert [(sample["sample"]["output_text"], sample["item"]) for sample in body["samples"]] == [(str(n), {"answer": n}) for n in range(3)]
    assert body["metadata"] == {"job_id": "ftjob-1", "grader_version": "grader_a@1"}
    standardwebhooks.Webhook(SECRET).verify(received.body, received.headers)
    assert received.headers["webhook-id"] == received.headers["idempotency-key"]


def test_the_order_of_the_results_does_not_matter() -> None:
    with FakeEndpoint(lambda received: answer({"results": results_for(received)[::-1]})) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch"), *numbered(5)))
    assert [grade.reward for grade in grades] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_what_waits_at_the_same_time_goes_together_and_never_more_than_fits() -> None:
    with FakeEndpoint(right) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch", batch_size=4, max_concurrency=1), *numbered(10)))
        sizes = [len(received.json["samples"]) for received in endpoint.requests]
    assert [grade.reward for grade in grades] == [float(number) for number in range(10)]
    assert sizes == [4, 4, 2]


def test_each_completion_of_a_batch_has_a_grade_of_its_own() -> None:
    def mixed(received: Received) -> Reply:
        good, null, text, high, bare = results_for(received)
        named = {**good, "sub_scores": {"a": 1}, "explanation": "well"}
        return answer({"results": [named, {**null, "score": None}, {**text, "score": "1"}, {**high, "score": 9}, {"id": bare["id"]}]})

    with FakeEndpoint(mixed) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch", reward_range=(0, 5)), *numbered(5)))
    assert (grades[0].reward, grades[0].sub_scores, grades[0].explanation) == (0.0, {"a": 1.0}, "well")
    assert (grades[1].reward, grades[1].abstained) == (None, True)
    errors = [None, None, "grader_invalid_score", "grader_score_out_of_range", "grader_invalid_score"]
    assert [grade.error for grade in grades] == errors
    assert [grade.reward for grade in grades[1:]] == [None] * 4


MIXED_UP: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "one too few": (lambda results: results[:-1], "grader_wrong_count"),
    "one too many": (lambda results: [*results, results[0]], "grader_wrong_count"),
    "none": (lambda results: [], "grader_wrong_count"),
    "one twice": (lambda results: [*results[:-1], results[0]], "grader_duplicate_id"),
    "one unknown": (lambda results: [*results[:-1], {**results[-1], "id": "x"}], "grader_unknown_id"),
    "one without": (lambda results: [*results[:-1], {"score": 1.0}], "grader_missing_id"),
    "an id that is no text": (lambda results: [*results[:-1], {**results[-1], "id": 3}], "grader_missing_id"),
    "a result that is no object": (lambda results: [*results[:-1], 1.0], "grader_missing_id"),
    "no list": (lambda results: {"a": 1}, "grader_invalid_score"),
}


@pytest.mark.parametrize("how", MIXED_UP)
def test_a_mixed_up_answer_is_nobodys_grade_and_each_kind_is_counted_by_itself(how: str) -> None:
    mix, code = MIXED_UP[how]
    with FakeEndpoint(lambda received: answer({"results": mix(results_for(received))})) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch"), *numbered(3)))
        assert [(grade.reward, grade.error, grade.attempts) for grade in grades] == [(None, code, 1)] * 3
        assert len(endpoint.requests) == 1


def test_the_failure_of_the_call_is_every_completions_failure() -> None:
    with FakeEndpoint([status(503)]) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch", max_attempts=2), *numbered(3)))
        assert len(endpoint.requests) == 2
    assert [(grade.reward, grade.error, grade.attempts) for grade in grades] == [(None, "grader_http_error", 2)] * 3


def test_a_batch_that_is_sent_again_has_the_same_name_and_content() -> None:
    def plan(received: Received) -> Reply:
        return status(503) if len(endpoint.requests) < 2 else right(received)

    with FakeEndpoint(plan) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch"), *numbered(3)))
    assert [grade.reward for grade in grades] == [0.0, 1.0, 2.0]
    assert len({(received.headers["webhook-id"], received.body) for received in endpoint.requests}) == 1
    assert len(endpoint.requests) == 3


def test_other_ids_give_a_batch_another_name() -> None:
    with FakeEndpoint(right) as endpoint:
        for first in (0, 0, 1):
            asyncio.run(grade_all(endpoint_grader(endpoint, format="batch"), *numbered(3, first)))
    names = [received.headers["webhook-id"] for received in endpoint.requests]
    assert names[0] == names[1] != names[2]


def test_an_id_is_never_twice_in_one_call() -> None:
    with FakeEndpoint(right) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch"), *numbered(2), *numbered(2)))
        assert [len(received.json["samples"]) for received in endpoint.requests] == [2, 2]
    assert [grade.reward for grade in grades] == [0.0, 1.0, 0.0, 1.0]


def test_a_row_that_is_not_json_fails_alone() -> None:
    with FakeEndpoint(right) as endpoint:
        bad = request(idempotency_key="f" * 64, item={"x": float("nan")})
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="batch"), bad, *numbered(2)))
        assert [len(received.json["samples"]) for received in endpoint.requests] == [2]
    assert [grade.error for grade in grades] == ["grader_request_invalid", None, None]


def test_who_is_cancelled_takes_nobody_along_and_the_last_one_ends_the_call() -> None:
    async def cancel_in_turn(endpoint: FakeEndpoint) -> None:
        grader = endpoint_grader(endpoint, format="batch")
        tasks = [asyncio.create_task(grader.grade(one)) for one in numbered(2)]
        await asyncio.to_thread(endpoint.wait_for_requests, 1)
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert not tasks[1].done()
        assert endpoint.num_open == 1
        tasks[1].cancel()
        await asyncio.to_thread(endpoint.wait_until_idle, 2.0)
        assert (await grade_all(grader, *numbered(1, first=7)))[0].reward == 7.0

    with FakeEndpoint(lambda received: right(received) if len(endpoint.requests) else hang()) as endpoint:
        asyncio.run(cancel_in_turn(endpoint))


def test_openrlhf_sends_three_lists_and_reads_the_rewards_in_their_order() -> None:
    def sum_of_lengths(received: Received) -> Reply:
        return answer({"rewards": [len(query) for query in received.json["query"]], "extra_logs": {"x": 1}})

    rows = [{"messages": [{"role": "user", "content": text}], "answer": text} for text in ("a", "bb")]
    asked = [request("!" * (3 * n), idempotency_key=f"{n:064x}", item=row) for n, row in enumerate(rows, 1)]
    with FakeEndpoint(sum_of_lengths) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="openrlhf"), *asked))
        (received,) = endpoint.requests
    assert received.json == {"query": ["a\n!!!", "bb\n!!!!!!"], "prompts": ["a\n", "bb\n"], "labels": ["a", "bb"]}
    assert [grade.reward for grade in grades] == [5.0, 9.0]


@pytest.mark.parametrize(
    ("rewards", "errors"),
    [
        ([1.0], ["grader_wrong_count"] * 2),
        ([1.0, 2.0, 3.0], ["grader_wrong_count"] * 2),
        ([1.0, float("nan")], [None, "grader_invalid_score"]),
        ([1.0, "2"], [None, "grader_invalid_score"]),
        (1.0, ["grader_invalid_score"] * 2),
        ({"0": 1.0, "1": 2.0}, ["grader_invalid_score"] * 2),
    ],
)
def test_openrlhf_without_one_number_for_each_completion_invents_none(rewards: Any, errors: list[str | None]) -> None:
    with FakeEndpoint([Reply(json.dumps({"rewards": rewards}).encode())]) as endpoint:
        grades = asyncio.run(grade_all(endpoint_grader(endpoint, format="openrlhf"), *numbered(2)))
    assert [grade.error for grade in grades] == errors
    assert [grade.reward is None for grade in grades] == [error is not None for error in errors]
