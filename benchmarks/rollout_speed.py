"""Our rollout engine against the library's `generate`: the same prompts, lengths and temperature, in turn on one machine.

`python -m benchmarks.rollout_speed WORK_FOLDER --config fixed drawn` runs the races whose names begin so, keeps their raw rounds in
WORK_FOLDER/rollout_speed.json and prints the tables of all that this commit has kept. The library gets a working copy in the precision
of the race; ours makes its own from float32 weights in every step, and its time counts.
"""

import itertools
import time
from pathlib import Path

from benchmarks.contender import Contender, Track
from benchmarks.library import LibraryRollout
from benchmarks.machine_switches import machine_switches, set_up_peer
from benchmarks.ours import opened
from benchmarks.phases import peak_bytes
from benchmarks.race import choose, prepare, print_report, race_parser, run_rounds, say
from benchmarks.race_table import Goal, Race
from benchmarks.workload import Workload, completion_lengths

PROGRAM = "rollout_speed"
CONFIGS = ["fixed-bf16", "fixed-float32", "drawn-bf16", "drawn-float32"]
GOALS = (Goal("rollout alone, 64 tokens", "fixed-bf16", 2.5), Goal("rollout alone, drawn lengths", "drawn-bf16", 4.0))


def roll_ours(track: Track, workload: Workload) -> None:
    """Completions go to a grader that answers at once, as in a step."""
    with opened(workload) as run:
        track.ready(machine_switches())
        for step in itertools.count(1):
            rollouts = run.collector.generate(step).rollouts
            track.finish_step({}, sum(len(rollout.token_ids) for rollout in rollouts), peak_bytes())


def roll_library(track: Track, workload: Workload, switches: dict[str, str]) -> None:
    set_up_peer(workload.num_threads, switches)
    rollout = LibraryRollout(workload)
    track.ready({})
    while True:
        rollout.generate()
        track.finish_step({}, sum(workload.lengths), peak_bytes())


def run_race(config: str, model: Path, log: Path, rounds: int, num_threads: int) -> Race:
    lengths, precision = config.split("-")
    workload = Workload(model, completion_lengths(lengths), "full", precision, num_threads)  # type: ignore[arg-type]
    with Contender("ours", log, roll_ours, workload) as ours, Contender("generate", log, roll_library, workload, ours.facts) as peer:
        for contender in (ours, peer):
            say(f"{config}, {contender.name}, warm-up", contender.step())
        return run_rounds(config, ours, peer, rounds)


def main() -> None:
    given = race_parser(PROGRAM, __doc__, CONFIGS).parse_args()
    chosen = choose(CONFIGS, given.config)
    model, log, record = prepare(given, PROGRAM)
    print(f"About {len(chosen) * (1 + 0.35 * given.rounds):.0f} minutes on two cores.", flush=True)
    for config in chosen:
        start = time.monotonic()
        record.add(run_race(config, model, log, given.rounds, given.threads))
        print(f"{config}: {time.monotonic() - start:.0f} s", flush=True)
    print_report(record, given.threads, GOALS)


if __name__ == "__main__":
    main()
