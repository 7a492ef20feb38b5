"""When calls are held back, made again and let go."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.outage import Breaker, probe_request
from tests.graders.helpers import request

DOWN = failed(GradeFailure.CONNECTION, "refused", attempts=3)
WRONG = failed(GradeFailure.INVALID_SCORE, "NaN")
GONE = replace(failed(GradeFailure.HTTP, "HTTP 404"), was_refused=True)


class Scripted:
    """Grades by `answer`, at once."""

    def __init__(self, answer: Callable[[GradeRequest], Grade]) -> None:
        self.answer = answer
        self.asked: Counter[str] = Counter()
        """Calls by completion; probes under "probe"."""
        self.probed: list[str] = []

    async def grade(self, request: GradeRequest) -> Grade:
        is_probe = bool(request.metadata.get("probe"))
        self.asked["probe" if is_probe else request.output_text] += 1
        if is_probe:
            self.probed.append(request.output_text)
        await asyncio.sleep(0)
        return self.answer(request)

    async def close(self) -> None:
        pass


def run(story: Callable[[], Awaitable[Any]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await story()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("grade", [Grade(0.5), Grade(None, abstained=True), WRONG, GONE], ids=["reward", "abstained", "NaN", "404"])
def test_an_answer_of_any_kind_is_passed_on_and_not_asked_for_again(grade: Grade) -> None:
    grader = Scripted(lambda request: grade)

    async def story() -> None:
        assert await Breaker(grader).grade(request("a")) == grade

    run(story)
    assert grader.asked == {"a": 1}


def test_a_call_that_fails_though_the_grader_answers_is_made_once_more_and_then_its_own_failure() -> None:
    grader = Scripted(lambda request: DOWN if request.output_text == "stumble" else Grade(0.5))

    async def story() -> None:
        breaker = Breaker(grader)
        await breaker.grade(request("good"))
        found = await breaker.grade(request("stumble"))
        assert (found.error, found.reward, found.attempts) == ("grader_connection_error", None, 6)
        assert breaker.outage is None

    run(story)
    assert grader.asked == {"good": 1, "stumble": 2, "probe": 1}
    assert grader.probed == ["good"], "what it stumbles over says nothing about the others"


def test_while_the_grader_is_away_calls_wait_and_then_all_are_answered() -> None:
    is_away = True
    grader = Scripted(lambda request: Grade(0.5))

    async def story() -> None:
        nonlocal is_away
        breaker = Breaker(grader)
        await breaker.grade(request("early"))
        grader.answer = lambda request: DOWN if is_away else Grade(0.5)
        calls = [asyncio.create_task(breaker.grade(request(text))) for text in "ab"]
        await until(lambda: breaker.outage is not None)
        assert breaker.outage is not None
        assert breaker.outage.failure == DOWN
        calls += [asyncio.create_task(breaker.grade(request(text))) for text in "cd"]
        await asyncio.sleep(0.02)
        assert (grader.asked["c"], grader.asked["d"]) == (0, 0)
        assert not any(call.done() for call in calls)
        is_away = False
        assert [(await call).reward for call in calls] == [0.5] * 4
        assert breaker.outage is None

    run(story)
    assert {text: grader.asked[text] for text in "abcd"} == {"a": 2, "b": 2, "c": 1, "d": 1}
    assert set(grader.probed) == {"early"}


def test_before_its_first_answer_one_stumble_holds_up_nobody() -> None:
    """Nothing is known that could be asked instead, so the first completion might be the only one that it cannot grade."""
    grader = Scripted(lambda request: DOWN if request.output_text == "stumble" else Grade(0.5))

    async def story() -> None:
        breaker = Breaker(grader)
        first = asyncio.create_task(breaker.grade(request("stumble")))
        await until(lambda: breaker.outage is not None)
        assert (await breaker.grade(request("good"))).reward == 0.5
        assert (await first).reward is None

    run(story)
    assert grader.asked["stumble"] == 2


def test_a_bug_in_a_probe_is_raised_where_its_answer_is_waited_for() -> None:
    def answer(request: GradeRequest) -> Grade:
        if request.metadata.get("probe"):
            raise ZeroDivisionError("a bug")
        return DOWN

    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            await Breaker(Scripted(answer)).grade(request("a"))

    run(story)


def test_closing_ends_the_probes() -> None:
    grader = Scripted(lambda request: DOWN)

    async def story() -> None:
        breaker = Breaker(grader)
        call = asyncio.create_task(breaker.grade(request("a")))
        await until(lambda: breaker.outage is not None)
        await breaker.close()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(story)


def test_a_probe_bears_no_completions_name() -> None:
    one = request("a")
    probes = [probe_request(one) for _ in range(2)]
    assert all(probe.metadata == {**one.metadata, "probe": True} and probe.output_text == "a" for probe in probes)
    assert len({one.idempotency_key, *(probe.idempotency_key for probe in probes)}) == 3
