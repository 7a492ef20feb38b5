"""Calls that fail now and then, by a seeded plan, at a grader that is slow: the rewards are those of a grader that never fails."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from core.grader_specs import PinnedEndpointGrader, PinnedGraderSpec
from core.run_directory import JOB, REWARDS, End, ResolvedJob, publish_json
from graders.endpoint import EndpointGrader
from graders.grade import Grader
from outbound.safe_http import NetworkPolicy
from outbound.signing import ID_HEADER
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, score, status
from tests.graders_behaviour.bench import RETRY, SECRETS, score_of
from tests.trainer.runs import make_run_directory, read_metrics, read_samples
from trainer.control import ControlReader, Pulse
from trainer.loop import run_job
from trainer.session import Secrets

SIZES = {"max_steps": 3, "batch_size": 8, "group_size": 8, "rows": 16}
COMPLETIONS = 3 * 8 * 8
MAX_ATTEMPTS = 5
LATENCY_SECONDS = 0.05
FAILURES = [lambda: status(500), lambda: status(429), lambda: status(503, retry_after="0"), lambda: Reply(reset=True)]


class SeededGrader:
    """Answers after a while. Whether a call fails is drawn from the grade's name and the number of the attempt."""

    def __init__(self, *, failing_calls: float = 0.0, one_lost_in: int = 0) -> None:
        self._failing_calls, self._one_lost_in = failing_calls, one_lost_in
        self.calls: Counter[str] = Counter()
        self.lost: set[str] = set()
        """Completions that it never grades."""

        self.num_failed = 0

    def __call__(self, received: Received) -> Reply:
        name, completion = received.headers[ID_HEADER], received.json["sample"]["output_text"]
        self.calls[name] += 1
        if not received.json["metadata"].get("probe"):
            if self._one_lost_in and self.calls[name] == 1 and len(self.calls) % self._one_lost_in == 1:
                self.lost.add(name)
            if name in self.lost:
                return status(500)
            if self.calls[name] < MAX_ATTEMPTS and draw(f"{name}/{self.calls[name]}") < self._failing_calls:
                self.num_failed += 1
                return FAILURES[self.num_failed % len(FAILURES)]()
        return score(score_of(completion), delay=LATENCY_SECONDS)


def draw(name: str) -> float:
    """In [0, 1), the same for the same name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def run(folder: Path, plan: SeededGrader, max_staleness: int) -> dict[str, float | None]:
    """The rewards in the journal, by completion."""
    make_run_directory(folder, max_staleness=max_staleness, **SIZES)
    with FakeEndpoint(plan) as endpoint:
        fixed = {"type": "endpoint", "secret_ref": "inline", "grader_version": "inline"}
        spec = PinnedEndpointGrader(**fixed, url=endpoint.url, max_attempts=MAX_ATTEMPTS, max_concurrency=64)
        job = ResolvedJob.model_validate_json((folder / JOB).read_text())
        publish_json(folder / JOB, job.model_copy(update={"grader": spec}))

        def make_grader(pinned: PinnedGraderSpec, secrets: Secrets, network: NetworkPolicy) -> Grader:
            assert isinstance(pinned, PinnedEndpointGrader)
            return EndpointGrader(pinned, {}, network=NetworkPolicy(LOOPBACK), retry=RETRY)

        pulse = Pulse(folder)
        assert run_job(folder, SECRETS, ControlReader(folder, pulse), pulse, make_grader).end is End.SUCCEEDED
        pulse.stop()
    lines = [json.loads(line) for line in (folder / REWARDS).read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == COMPLETIONS
    return {line["key"]: line["reward"] for line in lines}


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_run_with_a_fifth_of_its_calls_failing_has_the_rewards_of_one_without(tmp_path: Path, max_staleness: int) -> None:
    perfect, failing = SeededGrader(), SeededGrader(failing_calls=0.2)
    wanted = run(tmp_path / "perfect", perfect, max_staleness)
    assert run(tmp_path / "failing", failing, max_staleness) == wanted
    assert None not in wanted.values()
    assert perfect.calls.total() == COMPLETIONS
    assert failing.calls.total() == COMPLETIONS + failing.num_failed
    assert 0.15 < failing.num_failed / failing.calls.total() < 0.25
    digests = [[line.digest for line in read_metrics(tmp_path / name)] for name in ("perfect", "failing")]
    assert digests[0] == digests[1]


def test_grades_that_fail_for_good_are_absent_and_none_is_invented(tmp_path: Path) -> None:
    plan = SeededGrader(failing_calls=0.2, one_lost_in=100)
    rewards = run(tmp_path / "run", plan, 0)
    assert sum(reward is None for reward in rewards.values()) == len(plan.lost) == 2
    samples = read_samples(tmp_path / "run")
    assert len(samples) == COMPLETIONS
    assert [sample.error for sample in samples if sample.reward is None] == ["grader_http_error"] * len(plan.lost)
    assert all(sample.reward in (None, score_of(sample.completion)) for sample in samples)
    assert all((sample.advantage is None) == (sample.reward is None) for sample in samples)
