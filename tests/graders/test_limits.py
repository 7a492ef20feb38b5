"""Limits over all processes of the platform, counted at a real server, with a real broker that is killed meanwhile."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis

from core.errors import GraderError
from core.grader_specs import CallOptions
from graders.shared_limits import SharedLimiter, SharedLimits
from tests.fake_endpoint import FakeEndpoint, score
from tests.graders.helpers import endpoint_grader, grade, request
from tests.servers import RestartableRedis, free_port

ROOT = Path(__file__).parents[2]
SETTLE_SECONDS = 2.0
TIMING = {"renew_seconds": 0.2, "lease_seconds": 10.0, "settle_seconds": SETTLE_SECONDS}
READY = {**TIMING, "settle_seconds": -1.0}
"""For a broker that nobody used before it was started: there is nothing to wait for."""


class CountingServer:
    """Counts a call as open from its arrival until its answer is about to be sent; `hold` keeps all answers back."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._lock = threading.Lock()
        self._seconds = seconds
        self.go = threading.Event()
        self.go.set()
        self.open = self.most_open = 0
        self.arrivals: list[float] = []
        counter = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                counter.answer()
                self.send_response(200)
                self.send_header("content-length", "12")
                self.end_headers()
                self.wfile.write(b'{"score": 1}')

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def answer(self) -> None:
        with self._lock:
            self.arrivals.append(time.monotonic())
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        time.sleep(self._seconds)
        self.go.wait(60)
        with self._lock:
            self.open -= 1

    def __enter__(self) -> "CountingServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def jobs(number: int, **given: Any) -> Iterator[list["subprocess.Popen[str]"]]:
    """So many processes that share one grader."""
    with ExitStack() as stack:
        processes = []
        for owner in range(number):
            command = [sys.executable, "-m", "tests.graders.limited_client"]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdin is not None
            process.stdin.write(json.dumps({"owner": f"job-{owner}", **given}))
            process.stdin.close()
            processes.append(process)
        yield processes


def grades_of(processes: list["subprocess.Popen[str]"]) -> list[int]:
    return [int(process.stdout.read()) for process in processes if process.stdout is not None]


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until_settled(url: str) -> None:
    """Until the broker gives new places, and half a second more, in which everybody has asked."""
    with redis.Redis.from_url(url, socket_timeout=2) as client:
        wait_until(lambda: client.info("server")["uptime_in_seconds"] > SETTLE_SECONDS + 1)
    time.sleep(0.5)


def test_four_jobs_never_have_more_calls_open_than_allowed_although_the_broker_is_killed_twice() -> None:
    with CountingServer(0.01) as server, RestartableRedis() as broker:
        given = {"broker_url": broker.url, "url": server.url, "count": 30, "timing": TIMING, "options": {"max_concurrency": 3}}
        with jobs(4, **given) as processes:
            for done in (10, 60):
                wait_until(lambda done=done: len(server.arrivals) >= done)
                server.go.clear()
                wait_until(lambda: server.open == 3)
                broker.kill()
                broker.start()
                wait_until_settled(broker.url)
                assert server.open == 3, "the holders' places were given away"
                server.go.set()
            assert grades_of(processes) == [30] * 4
    assert server.most_open == 3
    assert len(server.arrivals) == 120


def test_four_jobs_together_begin_no_more_calls_a_second_than_allowed(redis_url: str) -> None:
    rate, count = 40.0, 15
    options = {"max_concurrency": 16, "rate_limit": rate}
    with CountingServer() as server:
        with jobs(4, broker_url=redis_url, url=server.url, count=count, timing=READY, options=options) as processes:
            assert grades_of(processes) == [count] * 4
        took = max(server.arrivals) - min(server.arrivals)
    assert took >= (4 * count - 1) / rate - 0.25
    assert took < 4 * (4 * count) / rate


def test_the_places_of_a_process_that_dies_come_back_with_the_end_of_its_lease(redis_url: str) -> None:
    given = {"broker_url": redis_url, "timing": {**READY, "lease_seconds": 1.0}, "options": {"max_concurrency": 2}}
    with CountingServer() as server:
        server.go.clear()
        with jobs(1, url=server.url, count=2, **given) as (dying,):
            wait_until(lambda: server.open == 2)
            dying.kill()
            dying.wait()
        server.go.set()
        with jobs(1, url=server.url, count=3, **given) as processes:
            assert grades_of(processes) == [3]


def limiter(broker_url: str, owner: str, *, service: str = "http://a", max_concurrency: int = 1, **timing: float) -> SharedLimiter:
    return SharedLimits(broker_url, "project", owner, **{**READY, **timing})(service, CallOptions(max_concurrency=max_concurrency))


async def take(one: SharedLimiter, served: list[str], name: str) -> None:
    async with one.place():
        served.append(name)
        await asyncio.sleep(0.002)


def test_jobs_take_turns_however_much_one_of_them_wants(redis_url: str) -> None:
    async def run() -> list[str]:
        served: list[str] = []
        greedy, modest = (limiter(redis_url, owner, service="http://turns") for owner in ("greedy", "modest"))
        many = [asyncio.create_task(take(greedy, served, "greedy")) for _ in range(60)]
        while len(served) < 5:
            await asyncio.sleep(0.001)
        few = [asyncio.create_task(take(modest, served, "modest")) for _ in range(8)]
        while "modest" not in served:
            await asyncio.sleep(0.001)
        await asyncio.gather(*few)
        found = list(served)
        await asyncio.gather(*many)
        await greedy.close()
        await modest.close()
        return found

    served = asyncio.run(run())
    since_the_first = served[served.index("modest") :]
    assert since_the_first.count("greedy") <= since_the_first.count("modest") == 8
    assert served.count("greedy") < 40, "the modest one had to wait for the greedy one's end"


def test_a_job_with_a_smaller_limit_is_not_kept_out(redis_url: str) -> None:
    async def run() -> int:
        served: list[str] = []
        wide = limiter(redis_url, "wide", service="http://narrow", max_concurrency=4)
        narrow = limiter(redis_url, "narrow", service="http://narrow", max_concurrency=1)
        many = [asyncio.create_task(take(wide, served, "wide")) for _ in range(400)]
        while len(served) < 10:
            await asyncio.sleep(0.001)
        await take(narrow, served, "narrow")
        position = served.index("narrow")
        for task in many:
            task.cancel()
        await asyncio.gather(*many, return_exceptions=True)
        await wide.close()
        await narrow.close()
        return position

    assert asyncio.run(run()) < 200


def test_a_cancelled_wait_and_a_cancelled_call_leave_nothing_behind(redis_url: str) -> None:
    async def run() -> None:
        first, second = (limiter(redis_url, owner, service="http://cancelled") for owner in ("a", "b"))
        served: list[str] = []

        async def hold() -> None:
            async with first.place():
                served.append("held")
                await asyncio.sleep(3600)

        holding = asyncio.create_task(hold())
        while not served:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(take(second, served, "never"))
        await asyncio.sleep(0.05)
        for task in (waiting, holding):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.wait_for(take(second, served, "after"), 5)
        assert served == ["held", "after"]
        await first.close()
        await second.close()

    asyncio.run(run())


def test_other_services_and_other_projects_do_not_count(redis_url: str) -> None:
    async def run() -> None:
        options = CallOptions(max_concurrency=1)
        one = SharedLimits(redis_url, "project", "a", **READY)("http://own", options)
        others = [
            SharedLimits(redis_url, "project", "a", **READY)("http://other", options),
            SharedLimits(redis_url, "stranger", "a", **READY)("http://own", options),
        ]
        async with one.place():
            for other in others:
                await asyncio.wait_for(take(other, [], ""), 5)
        for each in (one, *others):
            await each.close()

    asyncio.run(run())


def test_who_holds_a_place_goes_on_while_the_broker_is_away() -> None:
    async def run(broker: RestartableRedis, endpoint: FakeEndpoint) -> list[Any]:
        limits = SharedLimits(broker.url, "project", "job", **{**READY, "away_seconds": 0.5})
        grader = endpoint_grader(endpoint, max_concurrency=1, make_limiter=limits)
        holding = asyncio.create_task(grader.grade(request(idempotency_key="holding")))
        await asyncio.to_thread(endpoint.wait_for_requests, 1)
        broker.kill()
        waiting = asyncio.create_task(grader.grade(request(idempotency_key="waiting")))
        held.clear()
        grades = [await holding, await waiting]
        await grader.close()
        return grades

    held = {"held"}
    with RestartableRedis() as broker, FakeEndpoint([score(0.5, is_held=lambda: bool(held))]) as endpoint:
        holding, waiting = asyncio.run(run(broker, endpoint))
        assert len(endpoint.requests) == 1
    assert (holding.reward, holding.attempts) == (0.5, 1)
    assert (waiting.reward, waiting.error, waiting.attempts) == (None, "grader_limits_unavailable", 0)
    assert waiting.is_outage


def test_without_a_broker_no_call_begins_and_none_is_a_number() -> None:
    limits = SharedLimits(f"redis://:hush-hush@127.0.0.1:{free_port()}/0", "project", "job", away_seconds=0.2)
    with FakeEndpoint([score(1.0)]) as endpoint:
        result = grade(endpoint_grader(endpoint, make_limiter=limits))
        assert endpoint.requests == []
    assert (result.reward, result.error) == (None, "grader_limits_unavailable")
    assert "hush" not in repr(result) + repr(limits)


def test_the_embedded_valkey_holds_limits_too(valkey_url: str) -> None:
    with FakeEndpoint([score(1.0)]) as endpoint:
        limits = SharedLimits(valkey_url, "project", "job", **READY)
        assert grade(endpoint_grader(endpoint, make_limiter=limits)).reward == 1.0


def test_a_broker_that_is_no_redis_is_refused_without_its_password() -> None:
    with pytest.raises(GraderError) as caught:
        SharedLimits("amqp://user:hush-hush@host//", "project", "job")("http://a", CallOptions())
    assert "hush" not in caught.value.message
