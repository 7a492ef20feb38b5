"""Graders that misbehave: R27 (a run neither dies nor trains on an invented number) and R28 (no wait on a network without an end)."""

import ast
import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.grader_specs import CallOptions, PinnedEndpointGrader
from core.run_directory import JOB, End, SampleLine, publish_json
from graders.calls import RetryPolicy
from graders.endpoint import EndpointGrader
from graders.grade import Grade, GradeRequest
from graders.limits import LimitsUnavailable
from graders.shared_limits import SharedLimits
from outbound.safe_http import NetworkPolicy
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, answer, dripping, hang, score, status
from tests.trainer.runs import make_run_directory, read_metrics, read_samples, train_here
from trainer.config import load_job

ROOT = Path(__file__).parents[2]
ROOMS = ("api", "client", "core", "database", "graders", "housekeeping", "local", "migrations", "outbound", "trainer", "worker")


class Maker:
    """Has the trainer build the endpoint grader at `url`, whatever the job names."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url, self._options = url, options

    def maker(self, *_: object) -> EndpointGrader:
        return endpoint(self._url, **self._options)


def endpoint(url: str, retry: RetryPolicy | None = None, **options: Any) -> EndpointGrader:
    spec = PinnedEndpointGrader(type="endpoint", url=url, secret_ref="inline", grader_version="inline", **options)
    return EndpointGrader(spec, {}, network=NetworkPolicy(LOOPBACK), retry=retry or RetryPolicy(base_seconds=0.01))


def worth(text: str) -> float:
    """Far from 0, so that an invented 0 would show."""
    return 1.0 + sum(map(ord, text)) % 97


def is_struck(text: str) -> bool:
    return sum(map(ord, text)) % 4 == 0


def train_with(folder: Path, plan: Callable[[Received], Reply], **options: Any) -> list[SampleLine]:
    """The samples of two steps whose grader answers by `plan`; a group is kept however many of its grades are lost."""
    run = make_run_directory(folder, max_steps=2, max_grader_failure_fraction=1.0)
    publish_json(run / JOB, load_job(run).model_copy(update={"grader_patience_seconds": 60.0}))
    started = time.monotonic()
    with FakeEndpoint(plan) as server:
        outcome = train_here(run, Maker(server.url, max_attempts=1, timeout_seconds=0.3, **options))  # type: ignore[arg-type]
    assert outcome.end is End.SUCCEEDED
    assert time.monotonic() - started < 60
    samples = read_samples(run)
    lost = [sample for sample in samples if sample.error is not None]
    assert 0 < len(lost) < len(samples)
    shown = sum(line.values["grader_failure_fraction"] for line in read_metrics(run)) / 2
    assert shown == pytest.approx(len(lost) / len(samples))
    return samples


STRUCK = {
    "hang": (hang(), "grader_timeout"),
    "drip": (dripping(0.05), "grader_timeout"),
    "500": (status(500), "grader_http_error"),
    "429": (status(429), "grader_http_error"),
    "reset": (Reply(reset=True), "grader_connection_error"),
    "garbage": (Reply(b"<html>"), "grader_invalid_json"),
    "nan": (score(float("nan")), "grader_invalid_score"),
    "string": (score("1"), "grader_invalid_score"),
}


@pytest.mark.parametrize("how", STRUCK)
def test_r27_what_the_grader_did_not_say_is_no_reward_and_is_shown(tmp_path: Path, how: str) -> None:
    """slime#1582, OpenRLHF#1317, verl#6673, AReno#405: a grader that hung or failed ended the run, or became a 0."""
    reply, code = STRUCK[how]

    def plan(received: Received) -> Reply:
        text = received.json["sample"]["output_text"]
        return reply if is_struck(text) else score(worth(text))

    for sample in train_with(tmp_path / "run", plan):
        if is_struck(sample.completion):
            assert (sample.reward, sample.advantage, sample.error) == (None, None, code)
        else:
            assert (sample.reward, sample.error) == (worth(sample.completion), None)


def results_for(received: Received) -> list[dict[str, Any]]:
    return [{"id": one["id"], "score": worth(one["sample"]["output_text"])} for one in received.json["samples"]]


@pytest.mark.parametrize(
    ("keep", "code"), [(slice(1, None), "grader_wrong_count"), (slice(0, 0), "grader_wrong_count")], ids=["short", "none"]
)
def test_r27_a_batch_of_wrong_length_is_nobodys_reward(tmp_path: Path, keep: slice, code: str) -> None:
    """compose-rl#87, harbor#1790: scores went to the wrong completions."""

    def plan(received: Received) -> Reply:
        results = results_for(received)
        is_short = is_struck(received.json["samples"][0]["sample"]["output_text"])
        return answer({"results": results[keep] if is_short else results})

    for sample in train_with(tmp_path / "run", plan, format="batch", batch_size=2):
        assert (sample.reward, sample.error) in [(None, code), (worth(sample.completion), None)]


def test_r27_the_order_of_a_batch_is_told_by_its_ids() -> None:
    async def grade_all(url: str) -> list[Grade]:
        grader = endpoint(url, format="batch")
        texts = "abcdefgh"
        asked = [grader.grade(GradeRequest(item={}, output_text=text, idempotency_key=f"key-{text}")) for text in texts]
        grades = await asyncio.gather(*asked)
        await grader.close()
        return grades

    with FakeEndpoint(lambda received: answer({"results": results_for(received)[::-1]})) as server:
        assert [grade.reward for grade in asyncio.run(grade_all(server.url))] == [worth(text) for text in "abcdefgh"]


def calls(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call below `node` and what is called, as it is written."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            yield ast.unparse(inner.func), inner


BOUNDS = {
    r"httpx\.((Async)?Client|get|post|put|stream|request)": {"timeout"},
    r"redis\.Redis(\.from_url)?|Redis\.from_url": {"socket_timeout", "socket_connect_timeout"},
    r"(urllib\.request\.)?urlopen|http\.client\.HTTPS?Connection|socket\.create_connection|OpenAI": {"timeout"},
    r"psycopg\.connect": {"connect_timeout"},
    r"create_engine": {"connect_args", "pool_timeout"},
    r"asyncio\.open_connection|requests\.\w+|aiohttp\.ClientSession": {"never"},
}
"""Client or call: the arguments of which it needs at least one or, of Redis, all."""


def unbounded(path: Path) -> list[str]:
    found = []
    for name, call in calls(ast.parse(path.read_text())):
        for pattern, bounds in BOUNDS.items():
            given = {keyword.arg for keyword in call.keywords}
            is_bounded = bounds <= given if "socket_timeout" in bounds else bool(bounds & given)
            if re.fullmatch(pattern, name) and not is_bounded:
                found.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    return found


def test_r28_every_network_client_has_a_timeout() -> None:
    """prime-rl#2230: a call without a timeout hung for ever."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 50
    assert [line for path in files for line in unbounded(path)] == []


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that takes every connection and says nothing."""
    taken = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: _take_all(server, taken), daemon=True).start()
        yield server.getsockname()[1]
    for connection in taken:
        connection.close()


def _take_all(server: socket.socket, taken: list[socket.socket]) -> None:
    while True:
        try:
            taken.append(server.accept()[0])
        except OSError:
            return


async def within(seconds: float, work: Any) -> Any:
    done, pending = await asyncio.wait({asyncio.ensure_future(work)}, timeout=seconds)
    assert not pending, f"still waiting after {seconds:g} seconds"
    return done.pop().result()


@pytest.mark.parametrize("how", ["silence", "drip"])
def test_r28_no_grader_holds_a_call_beyond_its_deadline(how: str) -> None:
    async def grade(url: str) -> Grade:
        grader = endpoint(url, timeout_seconds=0.2, max_attempts=2)
        return await within(10.0, grader.grade(GradeRequest(item={}, output_text="4")))

    with silent_server() as port, FakeEndpoint([dripping(0.1)]) as slow:
        found = asyncio.run(grade(f"http://127.0.0.1:{port}/" if how == "silence" else slow.url))
    assert (found.reward, found.error) == (None, "grader_timeout")


def test_r28_no_broker_holds_a_call_for_ever() -> None:
    async def wait_for_place(port: int) -> None:
        limiter = SharedLimits(f"redis://127.0.0.1:{port}/0", "project", "job", away_seconds=0.1)("http://a", CallOptions())

        async def take() -> None:
            async with limiter.place():
                pass

        with pytest.raises(LimitsUnavailable):
            await within(10.0, take())

    with silent_server() as port:
        asyncio.run(wait_for_place(port))
