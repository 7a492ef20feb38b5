"""What the platform costs beside the training: the demo's job by `python -m trainer` alone and through `hone up`, in turn.

`python -m benchmarks.platform_overhead WORK_FOLDER` adds a round to those of the same commit and steps in WORK_FOLDER and prints one
table over all of them. CPU-seconds are user and system time of whole process trees. Needs the machine for itself.
"""

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from benchmarks.machine import describe_commit, describe_machine
from benchmarks.platform_runs import CPU, OWN_START, ROLES, TRAINER, Used, Workload, run_alone, warm_platform
from benchmarks.trainer_runs import RunFailed
from examples.demo.settings import PLANS
from local.models import SMOLLM2_NAME, convert_smollm2

DEMO_STEPS = int(PLANS["grpo"].hyperparameters["max_steps"])
WANTED_RATIO, WANTED_SECONDS = 1.03, 2.0
RECORDS = "rounds.jsonl"


class Round(BaseModel):
    """The job once each way."""

    commit: str
    steps: int
    alone: Used
    platform: Used


def make_round(folder: Path, work: Workload, *, platform_first: bool) -> tuple[Used, Used]:
    """(alone, platform). Raises: RunFailed, also where the two did not compute the same; DemoFailed."""
    shutil.rmtree(folder, ignore_errors=True)
    if platform_first:
        platform, alone = _through_platform(folder / "platform", work), run_alone(folder / "alone", work)
    else:
        alone, platform = run_alone(folder / "alone", work), _through_platform(folder / "platform", work)
    shutil.rmtree(folder)
    if alone.digest != platform.digest:
        raise RunFailed("The two runs of the same job did not compute the same: nothing to compare.")
    return alone, platform


def _through_platform(folder: Path, work: Workload) -> Used:
    with warm_platform(folder, work) as platform:
        idle = platform.idle()
        return platform.run_job(work.steps).model_copy(update={"idle": idle})


def per_step(used: Used, steps: int) -> CPU:
    """CPU-seconds of a whole job of `steps` steps, by each step: its start, with the first step in it, and its end are spread over them."""
    return {role: used.step[role] + (used.start[role] + used.end[role] - used.step[role]) / steps for role in used.step}


def make_table(rounds: list[Round]) -> str:
    """Markdown; medians over the rounds."""
    lines = ["| | trainer alone | platform | platform / alone | beside the trainer |", "| --- | --- | --- | --- | --- |"]
    pairs = [(sum(a.values()), sum(b.values())) for entry in rounds for a, b in zip(entry.alone.steps, entry.platform.steps, strict=True)]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    ratios = sorted(platform / alone for alone, platform in pairs)
    spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    lines.append(f"| CPU-seconds of a step while it trains, median | {medians[0]:.2f} | {medians[1]:.2f} | {spread} | |")
    measures: dict[str, Callable[[Used], CPU]] = {
        "the same, mean": lambda used: used.step,
        "CPU-seconds from the start to the first step": lambda used: used.start,
        "CPU-seconds from the last step to the end": lambda used: used.end,
        f"CPU-seconds per step of a whole job of {rounds[0].steps} steps": lambda used: per_step(used, rounds[0].steps),
        f"the same for the demo's {DEMO_STEPS} steps (wanted: {WANTED_RATIO})": lambda used: per_step(used, DEMO_STEPS),
    }
    for name, measure in measures.items():
        alone, platform = ([measure(used) for used in side] for side in _sides(rounds))
        ratio = statistics.median(sum(b.values()) / sum(a.values()) for a, b in zip(alone, platform, strict=True))
        beside = statistics.median(sum(b.values()) / b[TRAINER] - 1 for b in platform)
        lines.append(f"| {name} | {_median_sum(alone)} | {_median_sum(platform)} | {ratio:.3f} | {100 * beside:+.1f} % |")
    seconds = [statistics.median(used.seconds_step for used in side) for side in _sides(rounds)]
    lines.append(f"| seconds of a step | {seconds[0]:.2f} | {seconds[1]:.2f} | {seconds[1] / seconds[0]:.3f} | |")
    for role in [role for role in ROLES if role != TRAINER]:
        step, idle = (statistics.median(getattr(entry.platform, name)[role] for entry in rounds) for name in ("step", "idle"))
        lines.append(f"| CPU-seconds of a step: {role} | | {step:.3f} | | idle: {100 * idle:.2f} % of a core |")
    return "\n".join(lines + _share_lines(rounds))


def beside_own_start(used: Used) -> float:
    """Seconds from the submission until a client can read the first step's metrics, without those of the trainer itself."""
    return sum(seconds for name, seconds in used.shares.items() if name != OWN_START)


def _share_lines(rounds: list[Round]) -> list[str]:
    whole = statistics.median(sum(entry.platform.shares.values()) for entry in rounds)
    lines = []
    for name in rounds[0].platform.shares:
        seconds = statistics.median(entry.platform.shares[name] for entry in rounds)
        alone = f"{statistics.median(entry.alone.shares[name] for entry in rounds):.2f}" if name == OWN_START else ""
        lines.append(f"| seconds to the first step: {name} | {alone} | {seconds:.2f} | | {100 * seconds / whole:.1f} % of the way |")
    before = statistics.median(beside_own_start(entry.platform) for entry in rounds)
    return [*lines, f"| seconds to the first step without the trainer's own start (wanted: {WANTED_SECONDS:g}) | | {before:.2f} | | |"]


def _median_sum(sides: list[CPU]) -> str:
    return f"{statistics.median(sum(side.values()) for side in sides):.2f}"


def _sides(rounds: list[Round]) -> tuple[list[Used], list[Used]]:
    return [entry.alone for entry in rounds], [entry.platform for entry in rounds]


def read_rounds(work: Path, commit: str, steps: int) -> list[Round]:
    path = work / RECORDS
    lines = path.read_text().splitlines() if path.exists() else []
    rounds = [Round.model_validate_json(line) for line in lines]
    return [entry for entry in rounds if (entry.commit, entry.steps) == (commit, steps)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.platform_overhead", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the model, the runs and the rounds so far (3 GB)")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--rounds", type=int, default=1, help="to add")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the trainer")
    parser.add_argument("--model", type=Path, help=f"folder with {SMOLLM2_NAME}; default: made below WORK_FOLDER")
    given = parser.parse_args()
    commit = describe_commit()
    work = Workload(given.model or convert_smollm2(given.work / "models"), given.steps, given.threads)
    for _ in range(given.rounds):
        number = len(read_rounds(given.work, commit, given.steps))
        alone, platform = make_round(given.work / "run", work, platform_first=number % 2 == 1)
        with open(given.work / RECORDS, "a") as records:
            records.write(Round(commit=commit, steps=given.steps, alone=alone, platform=platform).model_dump_json() + "\n")
    rounds = read_rounds(given.work, commit, given.steps)
    shown = {str(given.work): "WORK_FOLDER", str(given.model): "MODEL_FOLDER"}
    command = " ".join(shown.get(argument, argument) for argument in sys.argv[1:])
    print(f"\nMachine: {describe_machine()}, {given.threads} threads  ")
    print(f"Commit: {commit}, {len(rounds)} rounds of {given.steps} steps  \nCommand: `python -m benchmarks.platform_overhead {command}`\n")
    print(make_table(rounds))


if __name__ == "__main__":
    main()
