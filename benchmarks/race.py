"""What the programs that race two contenders share: rounds in turn, the command line, the report at the end."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contender import Contender, Report
from benchmarks.machine import describe_commit, describe_machine
from benchmarks.race_table import Entry, Goal, Race, Record, make_goals, make_table
from local.models import convert_smollm2
from worker.trainer_process import trainer_environment


def run_rounds(config: str, ours: Contender, peer: Contender, rounds: int) -> Race:
    """Both are warm. Each round takes one step of each, so that what drifts falls on both alike."""
    reports: dict[str, list[Report]] = {"ours": [], "peer": []}
    for number in range(1, rounds + 1):
        for side, contender in (("ours", ours), ("peer", peer)):
            reports[side].append(contender.step())
            say(f"{config}, round {number}/{rounds}, {contender.name}", reports[side][-1])
    return Race(config, Entry(ours.name, reports["ours"]), Entry(peer.name, reports["peer"]))


def say(what: str, report: Report) -> None:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
    print(f"{what}: {phases} s, {report.peak_bytes / 2**30:.2f} GiB", flush=True)


def race_parser(program: str, description: str, configs: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    parser.add_argument("work", type=Path, help="folder for the model (0.5 GB), the raw rounds and the contenders' log")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="NAME", help=f"beginnings of names; none: the kept table alone. {', '.join(configs)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", type=Path, help="a model folder in place of SmolLM2-135M-Instruct")
    return parser


def choose(configs: Sequence[str], beginnings: list[str]) -> list[str]:
    """Raises: SystemExit for a beginning of none."""
    unknown = [beginning for beginning in beginnings if not any(config.startswith(beginning) for config in configs)]
    if unknown:
        raise SystemExit(f"--config {' '.join(unknown)}: there are {', '.join(configs)}.")
    return [config for config in configs if config.startswith(tuple(beginnings))] if beginnings else []


def prepare(given: argparse.Namespace, program: str) -> tuple[Path, Path, Record]:
    """(model folder, log, record). Every process started from now on has the environment of a real trainer."""
    os.environ.update(trainer_environment(given.threads))
    given.work.mkdir(parents=True, exist_ok=True)
    log = given.work / f"{program}.log"
    log.unlink(missing_ok=True)
    model = given.model or convert_smollm2(given.work / "models")
    return model, log, Record(given.work / f"{program}.json", describe_commit())


def print_report(record: Record, num_threads: int, goals: Sequence[Goal]) -> None:
    races = record.races()
    if not races:
        print("No races of this commit are kept.")
        return
    print(f"\nMachine: {describe_machine()}, {num_threads} threads  \nCommit: {describe_commit()}\n")
    print(f"{make_table(races)}\n\n{make_goals(races, goals)}")
