"""How the cost of a step grows with group size, completion length, prompts and model size, one at a time, on random weights.

`python -m benchmarks.scaling` measures each point in a fresh process and prints one table with the exponents of growth: 1 is
proportional, 2 quadratic. Needs the machine for itself.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch

from benchmarks.machine import describe_commit, describe_machine
from benchmarks.measured_step import MeasuredStep, best_seconds, make_options, number_tokenizer, prepare_machine, random_model
from benchmarks.operations import Shape, Work, rollout_needs, update_needs

FACTORS = (1, 2, 4)
SHAPES = (
    Shape(hidden=256, intermediate=704, layers=8, heads=4, kv_heads=2, head_dim=64, vocabulary=16384),
    Shape(hidden=384, intermediate=1024, layers=10, heads=6, kv_heads=2, head_dim=64, vocabulary=16384),
    Shape(hidden=512, intermediate=1408, layers=15, heads=8, kv_heads=2, head_dim=64, vocabulary=16384),
)
BASE = Work(prompts=2, group_size=8, prompt_tokens=48, completion_tokens=64)
QUICK_SHAPES = tuple(Shape(hidden, 2 * hidden, 2, 2, 1, hidden // 2, 512) for hidden in (32, 64, 128))
QUICK_BASE = Work(prompts=1, group_size=2, prompt_tokens=16, completion_tokens=16)
POINT_SECONDS = 300


@dataclass(frozen=True)
class Point:
    shape: Shape
    work: Work
    precision: str
    device: str
    threads: int
    repeats: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        raw = json.loads(text)
        return cls(**{**raw, "shape": Shape(**raw["shape"]), "work": Work(**raw["work"])})

    @property
    def operations(self) -> float:
        """Needed by arithmetic."""
        return rollout_needs(self.shape, self.work, 2).operations + update_needs(self.shape, self.work).operations


@dataclass(frozen=True)
class Cost:
    rollout: float
    """Seconds."""

    update: float
    """Seconds, the optimizer's with them."""

    peak_bytes: float
    """Of the process, or of the device's allocator; libraries and weights with it."""


@dataclass(frozen=True)
class Axis:
    """Points that differ in one size."""

    name: str
    sizes: list[float]
    points: list[Point]


def axes(base: Point, shapes: Sequence[Shape]) -> list[Axis]:
    """The base point is the first of each."""
    fields = {"group size": "group_size", "completion tokens": "completion_tokens", "prompts per step": "prompts"}
    found = []
    for name, field in fields.items():
        sizes = [factor * getattr(base.work, field) for factor in FACTORS]
        found.append(Axis(name, sizes, [replace(base, work=replace(base.work, **{field: size})) for size in sizes]))
    models = [replace(base, shape=shape) for shape in shapes]
    return [*found, Axis("parameters", [shape.parameters for shape in shapes], models)]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the line through the logarithms by least squares: cost ~ size ** exponent."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure_here(point: Point) -> Cost:
    """One step to warm up, then the best of `repeats`."""
    prepare_machine(make_options(point.work, point.precision), point.threads)
    device = torch.device(point.device)
    step = MeasuredStep(random_model(point.shape), number_tokenizer(point.shape.vocabulary), point.work, point.precision, device)
    step.run()
    seconds = best_seconds([step.run() for _ in range(point.repeats)])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
    return Cost(seconds["rollout"], seconds["update"] + seconds["optimizer"], peak)


def peak_resident_bytes() -> float:
    """Of this program alone: the counter of getrusage begins with what the parent had."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return float(match[1]) * 1024


def measure(point: Point) -> Cost:
    """In a fresh process. Raises: CalledProcessError, its errors shown."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", point.to_json()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=POINT_SECONDS)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def make_table(measured: dict[Point, Cost], lines: list[Axis]) -> str:
    head = ["", "size", "rollout, s", "update, s", "peak memory, GB", "GFLOP needed"]
    rows = [head, ["---"] * len(head)]
    for axis in lines:
        costs = [measured[point] for point in axis.points]
        for size, point, cost in zip(axis.sizes, axis.points, costs, strict=True):
            numbers = [f"{cost.rollout:.2f}", f"{cost.update:.2f}", f"{cost.peak_bytes / 1e9:.2f}", f"{point.operations / 1e9:.0f}"]
            rows.append([axis.name, f"{size / 1e6:.1f} M" if size >= 1e6 else f"{size:.0f}", *numbers])
        columns = [
            [cost.rollout for cost in costs],
            [cost.update for cost in costs],
            [cost.peak_bytes for cost in costs],
            [point.operations for point in axis.points],
        ]
        rows.append([f"**exponent of {axis.name}**", "", *(f"**{exponent(axis.sizes, column):.2f}**" for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models and few tokens: a trial, not a measurement")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--point", type=Point.from_json, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point is not None:
        print(json.dumps(asdict(measure_here(given.point))))
        return
    shapes, work = (QUICK_SHAPES, QUICK_BASE) if given.quick else (SHAPES, BASE)
    lines = axes(Point(shapes[0], work, given.precision, given.device, given.threads, given.repeats), shapes)
    measured = {point: measure(point) for point in dict.fromkeys(point for axis in lines for point in axis.points)}
    print(f"Machine: {describe_machine()}, {given.threads} threads  \nCommit: {describe_commit()}  ")
    print(f"Model: {shapes[0].parameters / 1e6:.1f} M parameters, {given.precision}; {work}\n")
    print(make_table(measured, lines))


if __name__ == "__main__":
    main()
