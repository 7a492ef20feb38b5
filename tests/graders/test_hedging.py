"""A slow call is sent twice: the first valid answer counts once, and the other call ends."""

import asyncio
import threading

import pytest

from graders.calls import HEDGE_SAMPLES
from tests.fake_endpoint import FakeEndpoint, Received, Reply, answer, hang, score, status
from tests.graders.helpers import endpoint_grader, grade_all, request


class HeldServer:
    """Answers the calls that warm up, then holds the first call of the grade that is asked about and answers its second one."""

    def __init__(self, second: Reply) -> None:
        self._second = second
        self._seen: dict[str, int] = {}
        self.release = threading.Event()

    def __call__(self, received: Received) -> Reply:
        name = received.headers["webhook-id"]
        self._seen[name] = self._seen.get(name, 0) + 1
        if not name.startswith("slow"):
            return score(0.5)
        return score(0.25, is_held=lambda: not self.release.is_set()) if self._seen[name] == 1 else self._second


def warm_up() -> list[object]:
    return [request(idempotency_key=f"warm-{number}") for number in range(HEDGE_SAMPLES)]


def slow_grade(endpoint: FakeEndpoint, **options: object) -> object:
    async def run() -> object:
        grader = endpoint_grader(endpoint, max_concurrency=options.pop("max_concurrency", 4), **options)
        for one in warm_up():
            await grader.grade(one)  # type: ignore[arg-type]
        return (await grade_all(grader, request(idempotency_key="slow")))[0]

    return asyncio.run(run())


def calls_of(endpoint: FakeEndpoint, name: str) -> list[Received]:
    return [received for received in endpoint.requests if received.headers["webhook-id"] == name]


def test_the_second_call_is_identical_its_answer_counts_and_the_first_is_let_go() -> None:
    plan = HeldServer(score(1.0))
    with FakeEndpoint(plan) as endpoint:
        result = slow_grade(endpoint, hedge=True)
        endpoint.wait_until_idle(2.0)
        first, second = calls_of(endpoint, "slow")
    assert (result.reward, result.error, result.attempts) == (1.0, None, 2)
    assert first.body == second.body
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert not plan.release.is_set()


@pytest.mark.parametrize("bad", [status(500), answer({"score": "x"})], ids=["500", "no number"])
def test_a_second_call_that_fails_does_not_end_the_first(bad: Reply) -> None:
    plan = HeldServer(bad)

    def release_later(received: Received) -> Reply:
        reply = plan(received)
        if reply is bad:
            threading.Timer(0.1, plan.release.set).start()
        return reply

    with FakeEndpoint(release_later) as endpoint:
        result = slow_grade(endpoint, hedge=True)
    assert (result.reward, result.attempts) == (0.25, 2)


def test_without_the_option_nothing_is_sent_twice() -> None:
    with FakeEndpoint(lambda received: hang() if received.headers["webhook-id"] == "slow" else score(0.5)) as endpoint:
        result = slow_grade(endpoint, timeout_seconds=0.5, max_attempts=1)
        assert (result.error, len(calls_of(endpoint, "slow"))) == ("grader_timeout", 1)


@pytest.mark.parametrize("limits", [{"max_concurrency": 1, "max_attempts": 2}, {"max_attempts": 1}], ids=str)
def test_a_second_call_needs_a_place_and_an_attempt_of_its_own(limits: dict[str, int]) -> None:
    with FakeEndpoint(lambda received: hang() if received.headers["webhook-id"] == "slow" else score(0.5)) as endpoint:
        result = slow_grade(endpoint, hedge=True, timeout_seconds=0.5, **limits)
        assert result.error == "grader_timeout"
        sent = [call.at for call in calls_of(endpoint, "slow")]
    assert result.attempts == len(sent) == limits["max_attempts"]
    assert sent[-1] - sent[0] >= 0.45 * (len(sent) - 1), "a second call before the first had its time"
