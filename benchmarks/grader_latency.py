"""What a slow grader costs: `python -m benchmarks.grader_latency`. Whole runs of the trainer on a tiny model, graded over HTTP.

Strictly on-policy a step waits for its slowest grade once; with `max_staleness` 1 it waits while the next batch is sampled and the last
one learned from; a serial loop waits for one grade after the other.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_commit, describe_machine
from core.grader_specs import PinnedEndpointGrader
from core.run_directory import JOB, End, ResolvedJob, publish_json
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, score
from tests.trainer.runs import make_run_directory, read_metrics
from trainer.control import ControlReader, Pulse
from trainer.loop import run_job

LATENCIES = (0.0, 0.05, 0.5, 2.0)
SIZES: dict[str, Any] = {"batch_size": 2, "group_size": 4, "max_completion_tokens": 64, "rows": 8}
MODEL = {"hidden": 256, "layers": 4, "head_scale": 4.0}
SECRETS: dict[str, Any] = {"inline": {"headers": {}, "signing_secret": None}}


@dataclass(frozen=True)
class Loop:
    title: str
    max_staleness: int
    max_concurrency: int


LOOPS = (Loop("on-policy", 0, 16), Loop("`max_staleness` 1", 1, 16), Loop("serial loop", 0, 1))


def run(folder: Path, loop: Loop, latency_seconds: float, num_steps: int) -> float:
    """Seconds of all steps, from the first sampled token on; without start-up and preflight."""

    def answer(received: Received) -> Reply:
        completion = received.json["sample"]["output_text"]
        return score(completion.count("a") / 64, delay=latency_seconds)

    make_run_directory(folder, max_steps=num_steps, max_staleness=loop.max_staleness, model=MODEL, **SIZES)
    with FakeEndpoint(answer) as endpoint:
        fixed: dict[str, Any] = {"type": "endpoint", "secret_ref": "inline", "grader_version": "inline", "url": endpoint.url}
        grader = PinnedEndpointGrader(**fixed, max_concurrency=loop.max_concurrency)
        job = ResolvedJob.model_validate_json((folder / JOB).read_text())
        changes = {"grader": grader, "allowed_private_networks": LOOPBACK, "num_threads": torch.get_num_threads()}
        publish_json(folder / JOB, job.model_copy(update=changes))
        pulse = Pulse(folder)
        outcome = run_job(folder, SECRETS, ControlReader(folder, pulse), pulse)
        pulse.stop()
    assert outcome.end is End.SUCCEEDED, outcome
    return sum(line.values["seconds_step"] for line in read_metrics(folder))


def measure(latencies: Sequence[float], num_steps: int, repeats: int) -> dict[tuple[float, Loop], float]:
    """Median seconds. The first run is not timed: kernels are chosen there."""
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "warm", LOOPS[0], 0.0, 2)
        cells = [(latency, loop) for latency in latencies for loop in LOOPS]
        seconds: dict[tuple[float, Loop], list[float]] = {cell: [] for cell in cells}
        for number in range(repeats):
            for latency, loop in cells:
                place = Path(folder) / f"{number}-{LOOPS.index(loop)}-{latency:g}"
                seconds[latency, loop].append(run(place, loop, latency, num_steps))
    return {cell: statistics.median(each) for cell, each in seconds.items()}


def make_table(measured: dict[tuple[float, Loop], float]) -> str:
    """Markdown: seconds, and the ratio to the same loop with the first latency."""
    latencies = sorted({latency for latency, _ in measured})
    lines = [["grader", *(loop.title for loop in LOOPS)], ["---"] * (1 + len(LOOPS))]
    for latency in latencies:
        cells = [(measured[latency, loop], measured[latency, loop] / measured[latencies[0], loop]) for loop in LOOPS]
        lines.append([f"{1000 * latency:.0f} ms", *(f"{seconds:.2f} s ({ratio:.2f} x)" for seconds, ratio in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    measured = measure(LATENCIES, given.steps, given.repeats)
    completions = SIZES["batch_size"] * SIZES["group_size"]
    print(f"Machine: {describe_machine()}\nCommit {describe_commit()}, {given.threads} threads")
    print(f"{given.steps} steps of {completions} completions, median of {given.repeats}\n\n{make_table(measured)}")


if __name__ == "__main__":
    main()
