import asyncio
from dataclasses import dataclass, field

import pytest

from core.errors import InvalidRequest
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.multi import MultiGrader
from tests.fake_endpoint import FakeEndpoint, hang, score, status
from tests.graders.helpers import endpoint_grader, grade, request


@dataclass
class Fixed:
    result: Grade
    closed: bool = False
    asked: list[GradeRequest] = field(default_factory=list)

    async def grade(self, request: GradeRequest) -> Grade:
        self.asked.append(request)
        await asyncio.sleep(0)
        return self.result

    async def close(self) -> None:
        self.closed = True


def test_formula_over_the_members_with_their_rewards_as_sub_scores() -> None:
    first = Fixed(Grade(1.0, sub_scores={"style": 0.25}, explanation="fine", attempts=3))
    second = Fixed(Grade(0.5))
    result = grade(MultiGrader({"a": first, "b": second}, "0.8 * a + 0.2 * b"))
    assert result.reward == pytest.approx(0.9)
    assert result.sub_scores == {"a": 1.0, "b": 0.5, "a.style": 0.25}
    assert (result.explanation, result.attempts, result.error) == ("a: fine", 3, None)
    assert first.closed
    assert second.closed


@pytest.mark.parametrize("formula", ["a + b", "a", "max(a, 0 * b)", "0 * b"])
def test_a_failed_member_fails_the_whole_whatever_the_formula(formula: str) -> None:
    broken = Fixed(failed(GradeFailure.TIMEOUT, "No answer."))
    result = grade(MultiGrader({"a": Fixed(Grade(1.0)), "b": broken}, formula))
    assert (result.reward, result.error, result.abstained) == (None, "grader_timeout", False)
    assert result.error_message == "Grader 'b': No answer."
    assert result.sub_scores == {"a": 1.0}


def test_an_abstaining_member_makes_the_whole_abstain() -> None:
    result = grade(MultiGrader({"a": Fixed(Grade(1.0)), "b": Fixed(Grade(None, abstained=True))}, "a + b"))
    assert (result.reward, result.error, result.abstained) == (None, None, True)


def test_a_failure_outweighs_an_abstention() -> None:
    members = {"a": Fixed(Grade(None, abstained=True)), "b": Fixed(failed(GradeFailure.HTTP, "HTTP 400"))}
    result = grade(MultiGrader(members, "a + b"))
    assert (result.error, result.abstained) == ("grader_http_error", False)


@pytest.mark.parametrize("formula", ["1 / a", "log(a)", "a ^ -1", "exp(1000 + a)"])
def test_formula_without_a_finite_value_is_a_failed_grade(formula: str) -> None:
    result = grade(MultiGrader({"a": Fixed(Grade(0.0))}, formula))
    assert (result.reward, result.error) == (None, "formula_value_error")


def test_bad_formula_is_refused_when_built() -> None:
    with pytest.raises(InvalidRequest) as caught:
        MultiGrader({"a": Fixed(Grade(0.0))}, "a + other")
    assert caught.value.code == "formula_parse_error"


def test_members_get_keys_of_their_own_that_do_not_change() -> None:
    first, second = Fixed(Grade(1.0)), Fixed(Grade(1.0))
    for _ in range(2):
        grade(MultiGrader({"a": first, "b": second}, "a + b"), request())
    keys = [[asked.idempotency_key for asked in member.asked] for member in (first, second)]
    assert keys[0][0] == keys[0][1] != keys[1][0] == keys[1][1]


def test_endpoints_are_asked_at_the_same_time_and_one_broken_one_fails_the_grade() -> None:
    with FakeEndpoint([score(1.0)]) as good, FakeEndpoint([status(500)]) as bad:
        members = {"good": endpoint_grader(good), "bad": endpoint_grader(bad, max_attempts=2)}
        result = grade(MultiGrader(members, "good + bad"))
        assert (result.reward, result.error, result.attempts) == (None, "grader_http_error", 2)
        assert len(bad.requests) == 2


def test_cancel_reaches_every_member() -> None:
    async def cancel(first: FakeEndpoint, second: FakeEndpoint) -> None:
        multi = MultiGrader({"a": endpoint_grader(first), "b": endpoint_grader(second)}, "a + b")
        task = asyncio.create_task(multi.grade(request()))
        for endpoint in (first, second):
            await asyncio.to_thread(endpoint.wait_for_requests, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for endpoint in (first, second):
            await asyncio.to_thread(endpoint.wait_until_idle, 2.0)
        await multi.close()

    with FakeEndpoint([hang()]) as first, FakeEndpoint([hang()]) as second:
        asyncio.run(cancel(first, second))
