"""Probes against a real server that behaves as told: each fault is found by the probe that is for it, and by no luck."""

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from graders.grade import Grade, GradeRequest
from graders.probe import BUILT_IN_ROW, LONG_TEXT, MAX_ROWS, NUM_TIMED, PLAIN_TEXT, ProbeReport, for_probing, probe_grader
from tests.fake_endpoint import FakeEndpoint, Received, Reply, answer, score, status
from tests.graders.helpers import endpoint_grader, endpoint_spec

PROBES = ["schema", "range", "repeatable", "latency", "rate", "empty", "very_long", "unicode", "prompt_echo"]


def right(received: Received) -> float:
    body = received.json
    return 1.0 if body["sample"]["output_text"] == body["item"]["answer"] else 0.1


def probed(plan: Callable[[Received], Reply], rows: list[dict[str, Any]] | None = None, **options: Any) -> tuple[ProbeReport, FakeEndpoint]:
    options = {"max_concurrency": 4, **options}
    with FakeEndpoint(plan) as endpoint:
        spec = for_probing(endpoint_spec(endpoint.url, **options))

        async def run() -> ProbeReport:
            grader = endpoint_grader(endpoint, **{**options, "max_attempts": 1})
            try:
                return await probe_grader(grader, spec, rows or [])
            finally:
                await grader.close()

        return asyncio.run(run()), endpoint


def outcomes(report: ProbeReport) -> dict[str, str]:
    """Those that did not just pass."""
    return {finding.probe: finding.outcome for finding in report.findings if finding.outcome != "passed"}


def text_of(received: Received) -> str:
    return str(received.json["sample"]["output_text"])


def test_good_grader_passes_every_probe_and_is_measured() -> None:
    report, endpoint = probed(lambda received: score(right(received)), reward_range=(0.0, 1.0))
    assert [finding.probe for finding in report.findings] == PROBES
    assert (outcomes(report), report.passed, report.num_rows) == ({}, True, 1)
    assert report.num_calls == len(endpoint.requests)
    found = {finding.probe: finding.numbers for finding in report.findings}
    assert (found["range"], found["schema"]["calls"]) == ({"lowest": 0.1, "highest": 1.0}, 2.0)
    latency = found["latency"]
    assert 0 < latency["p50_seconds"] <= latency["p95_seconds"] <= latency["p99_seconds"] < 5
    assert found["rate"]["calls_per_second"] > 0
    assert endpoint.most_open <= 4
    texts = [text_of(received) for received in endpoint.requests]
    assert {"", PLAIN_TEXT, "4", LONG_TEXT, BUILT_IN_ROW["messages"][0]["content"]} < set(texts)
    assert all("webhook-signature" in received.headers for received in endpoint.requests)
    assert len({received.headers["webhook-id"] for received in endpoint.requests}) == report.num_calls
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["summary"] == "9 of 9 probes passed"


FAULTS: dict[str, tuple[Callable[[Received], Reply], dict[str, str]]] = {
    "chance": (lambda received: score(int(received.headers["webhook-id"][-2:], 16) / 255), {"repeatable": "failed"}),
    "outside the range": (lambda received: score(10 * right(received)), {"range": "failed"}),
    "a constant": (lambda received: score(0.5), {"range": "warning"}),
    "no score ever": (lambda received: score(None), {"range": "failed"}),
    "breaks on an empty text": (lambda received: score(right(received)) if text_of(received) else status(500), {"empty": "failed"}),
    "breaks on a long text": (
        lambda received: status(413) if len(received.body) > 65536 else score(right(received)),
        {"very_long": "failed"},
    ),
    "breaks beyond ASCII": (lambda received: score(right(received)) if text_of(received).isascii() else status(400), {"unicode": "failed"}),
    "rewards an echo": (
        lambda received: score(max(right(received), float(text_of(received) in received.json["item"]["messages"][0]["content"]))),
        {"prompt_echo": "warning", "empty": "warning"},
    ),
    "a number as a string": (lambda received: answer({"score": "1.0"}), {"schema": "failed", **dict.fromkeys(PROBES[1:], "skipped")}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_by_its_own_probe(fault: str) -> None:
    plan, wanted = FAULTS[fault]
    report, _ = probed(plan, reward_range=(0.0, 1.0))
    found = outcomes(report)
    if fault == "chance":  # the scores of empty and echo are drawn, too
        found = {name: outcome for name, outcome in found.items() if outcome == "failed"}
    assert found == wanted
    assert report.passed == all(outcome == "warning" for outcome in wanted.values())


def test_limit_below_the_own_concurrency_is_found_under_load() -> None:
    """Once calls no longer come one by one, none is answered before there were three at the same time."""

    def plan(received: Received) -> Reply:
        if endpoint.num_open >= 2:
            return status(429)
        return score(right(received), is_held=lambda: len(endpoint.requests) > NUM_TIMED and endpoint.most_open < 3)

    with FakeEndpoint(plan) as endpoint:
        spec = for_probing(endpoint_spec(endpoint.url, max_concurrency=8))

        async def run() -> ProbeReport:
            grader = endpoint_grader(endpoint, max_concurrency=8, max_attempts=1)
            try:
                return await probe_grader(grader, spec)
            finally:
                await grader.close()

        report = asyncio.run(run())
    assert outcomes(report) == {"rate": "failed"}
    (rate,) = [finding for finding in report.findings if finding.probe == "rate"]
    assert "grader_http_error" in rate.message
    assert "429" in rate.message


def test_nobody_there_skips_the_rest_at_once() -> None:
    report, endpoint = probed(lambda received: status(503))
    assert outcomes(report) == {"schema": "failed", **dict.fromkeys(PROBES[1:], "skipped")}
    assert (report.passed, len(endpoint.requests)) == (False, 2)
    assert "HTTP 503" in report.findings[0].message


def test_own_rows_are_asked_with_and_bounded() -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{number}"}], "answer": str(number)} for number in range(MAX_ROWS + 10)]
    report, endpoint = probed(lambda received: score(right(received)), rows)
    assert (outcomes(report), report.num_rows) == ({}, MAX_ROWS)
    assert {received.json["item"]["answer"] for received in endpoint.requests} == {str(number) for number in range(MAX_ROWS)}


def test_probes_end_at_the_deadline_and_what_was_not_made_is_skipped() -> None:
    class Stuck:
        calls = 0

        async def grade(self, request: GradeRequest) -> Grade:
            self.calls += 1
            if self.calls > 4:
                await asyncio.Event().wait()
            return Grade(float(self.calls % 2))

        async def close(self) -> None: ...

    report = asyncio.run(probe_grader(Stuck(), endpoint_spec("http://localhost/"), deadline_seconds=0.2))
    assert [finding.outcome for finding in report.findings[:3]] == ["passed", "passed", "passed"]
    assert {finding.outcome for finding in report.findings[3:]} == {"skipped"}
    assert not report.passed


class Batching:
    """Its score depends on how many it grades together, as a grader's that ranks within a batch does."""

    def __init__(self, drift: float) -> None:
        self._drift, self._open = drift, 0

    async def grade(self, request: GradeRequest) -> Grade:
        self._open += 1
        await asyncio.sleep(0)
        together = self._open
        await asyncio.sleep(0)
        self._open -= 1
        return Grade(len(request.output_text) / 1e6 + self._drift * (together > 1))

    async def close(self) -> None: ...


@pytest.mark.parametrize(("drift", "outcome"), [(0.0, "passed"), (0.25, "failed")])
def test_batch_that_grades_otherwise_than_alone_is_found(drift: float, outcome: str) -> None:
    options = endpoint_spec("http://localhost/").model_copy(update={"format": "batch"})
    report = asyncio.run(probe_grader(Batching(drift), options))
    (batch,) = [finding for finding in report.findings if finding.probe == "batch"]
    assert batch.outcome == outcome
    assert math.isclose(batch.numbers.get("largest_difference", 0.0), drift)
