"""How near a step is to what the machine can do: its limits, the operations that the step needs, and the trainer's own time for them.

`python -m benchmarks.floor MODEL_FOLDER` (a Llama-like model) measures limits and steps in turn and prints one table. Needs the machine
for itself.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.machine import describe_commit, describe_machine
from benchmarks.measured_step import MeasuredStep, Seconds, best_seconds, make_options, now, prepare_machine
from benchmarks.operations import Needs, Shape, Work, optimizer_needs, rollout_needs, update_needs
from trainer.policy import load_model
from trainer.tokens import load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
HEAD_ROWS = 682
"""What the trainer gives to the head at once for 49,152 tokens: trainer.logprobs.MAX_CHUNK_LOGITS."""

ARRAY_BYTES = 2**29
REPEATS = 3
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Limits:
    """What the machine did at its best, per second."""

    decode: float
    """Operations in products of as many rows as there are completions."""

    update: float
    """Operations in products of as many rows as there are tokens in the update."""

    bytes: float
    """To and from memory."""

    def best(self, other: "Limits") -> "Limits":
        return Limits(max(self.decode, other.decode), max(self.update, other.update), max(self.bytes, other.bytes))


def measure_limits(shape: Shape, work: Work, dtype: torch.dtype, device: torch.device) -> Limits:
    return Limits(
        decode=product_rate(shape, work.rows, dtype, device),
        update=product_rate(shape, work.packed_tokens, dtype, device),
        bytes=memory_rate(device),
    )


def product_rate(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one pass through all linear layers, each with its own weights: plain or laid out by oneDNN, the faster."""
    head = (shape.hidden, shape.vocabulary, min(rows, HEAD_ROWS))
    sizes = [(inputs, outputs, rows) for _ in range(shape.layers) for inputs, outputs in shape.layer_products] + [head]
    given = {
        (inputs, count): torch.randn(count, inputs, device=device).to(dtype)
        for inputs, count in {(inputs, count) for inputs, _, count in sizes}
    }
    operations = sum(2.0 * inputs * outputs * count for inputs, outputs, count in sizes)
    makers = [make_plain, *([make_packed] if device.type == "cpu" and torch.backends.mkldnn.is_available() else [])]
    seconds = []
    for make in makers:
        products = [make(torch.randn(outputs, inputs, device=device).to(dtype), count) for inputs, outputs, count in sizes]
        inputs_of = [given[inputs, count] for inputs, _, count in sizes]
        seconds.append(_fastest(lambda: [product(x) for product, x in zip(products, inputs_of, strict=True)], device))  # noqa: B023
    return operations / min(seconds)


def make_plain(weight: Tensor, rows: int) -> Product:
    return lambda x: functional.linear(x, weight)


def make_packed(weight: Tensor, rows: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def memory_rate(device: torch.device) -> float:
    """Bytes per second to and from memory, of numbers that fit no cache: of a sum, a copy and an addition the fastest."""
    first, second, target = (torch.ones(ARRAY_BYTES // 4, device=device) for _ in range(3))
    streams: list[tuple[int, Callable[[], object]]] = [
        (1, first.sum),
        (2, lambda: target.copy_(first)),
        (3, lambda: torch.add(first, second, out=target)),
    ]
    return max(count * ARRAY_BYTES / _fastest(work, device) for count, work in streams)


@torch.inference_mode()
def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of REPEATS calls after a first one."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return min(seconds)


def floor_seconds(needs: Needs, rate: float, bytes_per_second: float) -> float:
    """Whichever takes longer: the operations or the bytes."""
    return max(needs.operations / rate if needs.operations else 0.0, needs.bytes / bytes_per_second)


def phase_rows(precision: str, shape: Shape, work: Work, limits: Limits, ours: Seconds) -> list[list[str]]:
    needs = {
        "rollout": (rollout_needs(shape, work, DTYPES[precision].itemsize), limits.decode),
        "update": (update_needs(shape, work), limits.update),
        "optimizer": (optimizer_needs(shape), limits.update),
    }
    rows, floors = [], []
    for phase, (need, rate) in needs.items():
        floors.append(floor_seconds(need, rate, limits.bytes))
        operations, data = (f"{value / 1e9:.0f}" if value else "" for value in (need.operations, need.bytes))
        shown = f"{rate / 1e9:.0f} GFLOP/s" if need.operations else f"{limits.bytes / 1e9:.0f} GB/s"
        rows.append([f"{precision}: {phase}", operations, data, shown, *_compared(floors[-1], ours[phase])])
    rows.append([f"{precision}: whole step", "", "", "", *_compared(sum(floors), sum(ours.values()))])
    return rows


def _compared(floor: float, ours: float) -> list[str]:
    return [f"{floor:.2f}", f"{ours:.2f}", f"{100 * floor / ours:.0f} %"]


def make_table(rows: list[list[str]]) -> str:
    head = ["", "GFLOP needed", "GB needed", "limit", "floor, s", "ours, s", "reached"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def measure(model: Path, precision: str, work: Work, rounds: int, device: torch.device) -> list[list[str]]:
    """The table's rows of one precision. Limits and steps are measured in turn; of both the best counts."""
    loaded = load_model(model)
    shape = Shape.of(loaded.config)
    step = MeasuredStep(loaded, load_tokenizer(model), work, precision, device)
    step.run()
    limits, measured = Limits(0.0, 0.0, 0.0), []
    for _ in range(rounds):
        limits = limits.best(measure_limits(shape, work, DTYPES[precision], device))
        measured.append(step.run())
    return phase_rows(precision, shape, work, limits, best_seconds(measured))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=sorted(DTYPES), action="append", help="default: both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    work = Work(given.prompts, given.group_size, given.prompt_tokens, given.completion_tokens)
    rows = []
    for precision in given.precision or ["bf16", "float32"]:
        prepare_machine(make_options(work, precision), given.threads)
        rows += measure(given.model, precision, work, given.rounds, torch.device(given.device))
    print(f"Machine: {describe_machine()}, {given.threads} threads  \nCommit: {describe_commit()}  ")
    print(f"Step: {work.prompts} x {work.group_size}, {work.prompt_tokens} prompt and {work.completion_tokens} completion tokens\n")
    print(make_table(rows))


if __name__ == "__main__":
    main()
