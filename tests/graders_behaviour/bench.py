"""One small GRPO run in this process against one way to misbehave, and what came of it."""

import hashlib
import json
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.grader_specs import PinnedEndpointGrader, PinnedGraderSpec
from core.run_directory import JOB, REWARDS, SAMPLES, Outcome, ResolvedJob, publish_json
from graders.calls import RetryPolicy
from graders.endpoint import EndpointGrader
from graders.grade import Grader
from outbound.safe_http import NetworkPolicy
from outbound.signing import ID_HEADER
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, answer, score
from tests.graders_behaviour.behaviours import ALL, FIRST, MAX_ATTEMPTS, ONE, UNTIL_CALL, Behaviour
from tests.outbound.test_safe_http import certificate
from tests.servers import free_port
from tests.trainer.runs import make_run_directory, read_samples
from trainer.control import ControlReader, Pulse
from trainer.loop import run_job
from trainer.session import Secrets

STEPS, BATCH_SIZE, GROUP_SIZE = 2, 2, 4
SECRETS: Secrets = {"inline": {"headers": {}, "signing_secret": None}}
RETRY = RetryPolicy(base_seconds=0.01, cap_seconds=0.02)


def score_of(completion: str) -> float:
    """What a grader that behaves says: told from the text alone, and never 0."""
    return (1 + hashlib.sha256(completion.encode()).digest()[0] % 90) / 100


class Misbehaving:
    """The plan of a FakeEndpoint."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self.calls: Counter[str] = Counter()
        """Of each completion, by the id of its grade."""

        self.probes = 0

    def __call__(self, received: Received) -> Reply:
        body = received.json
        if self._behaviour.mix_up is not None:
            return self._answer_batch(body["samples"], self._behaviour.mix_up)
        if body["metadata"].get("probe"):
            self.probes += 1
            return self._misbehave() if self._is_for_all() else score(score_of(body["sample"]["output_text"]))
        name = received.headers[ID_HEADER]
        self.calls[name] += 1
        return self._misbehave() if self._is_meant(name) else score(score_of(body["sample"]["output_text"]))

    def _answer_batch(self, samples: list[Any], mix_up: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Reply:
        self.calls.update(sample["id"] for sample in samples)
        return answer({"results": mix_up([{"id": entry["id"], "score": score_of(entry["sample"]["output_text"])} for entry in samples])})

    @property
    def victim_calls(self) -> int:
        """About the completion that came first."""
        return next(iter(self.calls.values()), 0)

    def _is_meant(self, name: str) -> bool:
        meant = {ONE: name == next(iter(self.calls)), FIRST: self.calls[name] == 1}
        return meant.get(self._behaviour.to, self._is_for_all())

    def _is_for_all(self) -> bool:
        num_calls = self.calls.total() + self.probes
        return self._behaviour.to == ALL or (self._behaviour.to == UNTIL_CALL and num_calls <= self._behaviour.until_call)

    def _misbehave(self) -> Reply:
        assert self._behaviour.reply is not None
        return self._behaviour.reply()


@dataclass(frozen=True)
class Result:
    behaviour: Behaviour
    outcome: Outcome
    seconds: float
    calls: Misbehaving
    samples: list[Any]
    journal: list[dict[str, Any]]

    @property
    def lost(self) -> Counter[str]:
        return Counter(line["error"] for line in self.last_lines if line["error"] is not None)

    @property
    def last_lines(self) -> list[dict[str, Any]]:
        """The line of the journal that counts, of each completion."""
        return list({line["key"]: line for line in self.journal}.values())

    @property
    def invented(self) -> int:
        """Rewards that the grader did not give."""
        half = {0.5} if self.behaviour.is_graded_half else set()
        wrong = [s for s in self.samples if s.reward is not None and s.reward not in {score_of(s.completion)} | half]
        unseen = [line for line in self.last_lines if line["reward"] is not None and not self.samples]
        return len(wrong) + len(unseen)

    @property
    def counted_twice(self) -> int:
        """Samples of the same place in the run, and rewards of the same completion in the journal."""
        places = Counter((sample.step, sample.prompt_index, sample.g) for sample in self.samples)
        rewarded = Counter(line["key"] for line in self.journal if line["reward"] is not None)
        return sum(count - 1 for count in (*places.values(), *rewarded.values()))


def run(behaviour: Behaviour, folder: Path) -> Result:
    plan = Misbehaving(behaviour)
    make_run_directory(folder, rows=4, max_steps=STEPS, batch_size=BATCH_SIZE, group_size=GROUP_SIZE)
    with _grader_at(behaviour, plan, folder) as (url, network, context):
        spec = PinnedEndpointGrader(**_spec(url, behaviour))
        job = ResolvedJob.model_validate_json((folder / JOB).read_text())
        patience = 30.0 if behaviour.to == UNTIL_CALL else 0.3
        publish_json(folder / JOB, job.model_copy(update={"grader": spec, "grader_patience_seconds": patience}))

        def make_grader(pinned: PinnedGraderSpec, secrets: Secrets, ours: NetworkPolicy) -> Grader:
            assert isinstance(pinned, PinnedEndpointGrader)
            return EndpointGrader(pinned, {}, network=network, retry=RETRY, ssl_context=context)

        pulse = Pulse(folder)
        started = time.monotonic()
        outcome = run_job(folder, SECRETS, ControlReader(folder, pulse), pulse, make_grader)
        seconds = time.monotonic() - started
        pulse.stop()
    samples = read_samples(folder) if (folder / SAMPLES).exists() else []
    journal = [json.loads(line) for line in (folder / REWARDS).read_text().splitlines()]
    return Result(behaviour, outcome, seconds, plan, samples, journal)


def _spec(url: str, behaviour: Behaviour) -> dict[str, Any]:
    fixed = {"type": "endpoint", "secret_ref": "inline", "grader_version": "inline", "url": url}
    return {**fixed, "timeout_seconds": 20.0, "max_attempts": MAX_ATTEMPTS, **behaviour.options}


@contextmanager
def _grader_at(behaviour: Behaviour, plan: Misbehaving, folder: Path) -> Iterator[tuple[str, NetworkPolicy, ssl.SSLContext | None]]:
    """(its URL, where calls may go, what its certificate is checked against)."""
    local = NetworkPolicy(LOOPBACK)
    own, trusting = certificate(folder, "localhost") if behaviour.place == "self-signed" else certificate(folder, "other.example")
    urls = {"closed port": f"http://localhost:{free_port()}/", "unknown name": "http://grader.invalid/"}
    is_tls = behaviour.place in ("self-signed", "wrong host")
    with nullcontext() if behaviour.place in urls else FakeEndpoint(plan, ssl_context=own if is_tls else None) as endpoint:
        url = urls[behaviour.place] if endpoint is None else endpoint.url
        network = NetworkPolicy((), allow_http=True) if behaviour.place == "private" else local
        yield url, network, trusting if behaviour.place == "wrong host" else None


def table(results: list[Result]) -> list[str]:
    """For people: a line for each behaviour, and the sums."""
    rows = [("the grader", "to", "the job", "graded", "lost to", "calls", "seconds", "invented", "twice")]
    for result in results:
        graded = sum(line["reward"] is not None for line in result.last_lines)
        lost = ", ".join(f"{kind} ({count})" for kind, count in sorted(result.lost.items())) or "-"
        end = result.outcome.end if result.outcome.pause_reason is None else f"{result.outcome.end}: {result.outcome.pause_reason}"
        calls = result.calls.victim_calls
        row = (str(result.behaviour), result.behaviour.to, str(end), f"{graded} of {STEPS * BATCH_SIZE * GROUP_SIZE}", lost, str(calls))
        rows.append((*row, f"{result.seconds:.1f}", str(result.invented), str(result.counted_twice)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    invented, twice = sum(result.invented for result in results), sum(result.counted_twice for result in results)
    sums = f"{len(results)} behaviours, {invented} rewards invented, {twice} samples counted twice. `calls`: about the first completion."
    return [*lines, "", sums]
