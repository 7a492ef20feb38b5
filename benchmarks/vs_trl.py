"""A whole training step of ours against TRL's GRPOTrainer: the same model, prompts, lengths, reward and loss, in turn on one machine.

`python -m benchmarks.vs_trl WORK_FOLDER --config fixed-full-bf16` checks that both compute the same gradient, then runs the races whose
names begin so, keeps their raw rounds in WORK_FOLDER/vs_trl.json and prints the tables of all that this commit has kept. It needs the
machine for itself and `pip install -e ".[benchmarks]"`.

The last part of a name is a precision: `bf16` holds everything of the peer's in bf16, which is its fastest and learns least; `amp`
gives both float32 weights and bf16 products; `float32` is float32 throughout. Ours has float32 weights always.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender
from benchmarks.gradient_check import check_gradients
from benchmarks.ours import run_ours
from benchmarks.race import choose, prepare, print_report, race_parser, run_rounds, say
from benchmarks.race_table import Goal, Race
from benchmarks.trl_peer import run_peer, save_peer_gradients
from benchmarks.workload import Workload, completion_lengths

PROGRAM = "vs_trl"
MICRO_BATCHES = [8, 4, 16, 32]
CONFIGS = ["-".join(parts) for parts in product(("fixed", "drawn"), ("full", "lora"), ("bf16", "amp", "float32"))]
GOALS = (
    Goal("whole step, bf16, 64 tokens", "fixed-full-bf16", 3.0),
    Goal("whole step, bf16, drawn lengths", "drawn-full-bf16", 3.5),
    Goal("whole step, float32", "fixed-full-float32", 2.5),
    Goal("peak memory, ours / peer, equal state precision", "fixed-full-amp", 1.0, is_memory=True),
    Goal("peak memory, ours / peer, peer all in bf16", "fixed-full-bf16", 1.25, is_memory=True),
)
MINUTES_CHECK, MINUTES_WARM_UP, MINUTES_ROUND = 1.0, 5.0, 0.7
"""On two cores with bf16; float32 takes about half as long again."""


def make_workload(model: Path, config: str, num_threads: int) -> Workload:
    lengths, finetuning, precision = config.split("-")
    return Workload(model, completion_lengths(lengths), finetuning, precision, num_threads)  # type: ignore[arg-type]


def run_race(config: str, workload: Workload, log: Path, given: argparse.Namespace) -> Race:
    with Contender("ours", log, run_ours, workload) as ours:
        say(f"{config}, ours, warm-up", ours.step())
        with fastest_peer(workload, log, ours.facts, given.micro_batches) as peer:
            return run_rounds(config, ours, peer, given.rounds)


def fastest_peer(workload: Workload, log: Path, switches: dict[str, Any], micro_batches: list[int]) -> Contender:
    """The peer at its best micro-batch, warm: each is warmed up and timed once, one process after the other. No other is left alive."""
    best: tuple[float, Contender] | None = None
    for micro_batch in micro_batches:
        peer = Contender(f"TRL, micro-batch {micro_batch}", log, run_peer, workload, micro_batch, switches)
        say(f"{peer.name}, warm-up", peer.step())
        report = peer.step()
        say(peer.name, report)
        slower = peer
        if best is None or report.seconds["step"] < best[0]:
            slower, best = best[1] if best else None, (report.seconds["step"], peer)
        if slower is not None:
            slower.close()
    assert best is not None, "at least one micro-batch is tried"
    return best[1]


def parse_arguments() -> argparse.Namespace:
    parser = race_parser(PROGRAM, __doc__, CONFIGS)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=MICRO_BATCHES, help="that the peer tries")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    chosen = choose(CONFIGS, given.config)
    model, log, record = prepare(given, PROGRAM)
    kinds = sorted({config.split("-")[1] for config in chosen})
    minutes = len(kinds) * MINUTES_CHECK + len(chosen) * (MINUTES_WARM_UP * len(given.micro_batches) / 4 + MINUTES_ROUND * given.rounds)
    print(f"About {minutes:.0f} minutes on two cores.", flush=True)
    for finetuning in kinds:
        workload = make_workload(model, f"drawn-{finetuning}-float32", given.threads)
        print(f"{finetuning}: {check_gradients(workload, log, save_peer_gradients)}", flush=True)
    for config in chosen:
        start = time.monotonic()
        record.add(run_race(config, make_workload(model, config, given.threads), log, given))
        print(f"{config}: {time.monotonic() - start:.0f} s", flush=True)
    print_report(record, given.threads, GOALS)


if __name__ == "__main__":
    main()
