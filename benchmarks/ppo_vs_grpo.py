"""What introductions say of PPO and GRPO in words, in numbers: SmolLM2 learns to add two numbers by each of them.

`python -m benchmarks.ppo_vs_grpo WORK_FOLDER` makes runs of the trainer below WORK_FOLDER and prints the table of results.md. Started
again it goes on with the run that it was in. `--phase learn` gives the rewards, which no other load on the machine changes;
`--phase time` gives seconds and memory, and needs the machine for itself.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison_table import Column, make_table, read_learned, read_timed
from benchmarks.machine import describe_commit, describe_machine
from benchmarks.trainer_runs import ensure_run, has_succeeded
from core.grader_specs import PythonGrader
from core.options import Options
from core.presets import resolve_options
from core.run_directory import ModelSource, ResolvedJob
from examples.demo import settings
from examples.demo.prompts import make_rows
from local.models import SMOLLM2_NAME, convert_smollm2

LAST_INTEGER = """import re


def grade(sample, item):
    return float(re.findall(r"-?\\d+", sample["output_text"])[-1:] == [item["answer"]])
"""
LEARN, TIME = "learn", "time"
TIMED_STEPS = 6

COMMON: dict[str, Any] = {
    **settings.COMMON,
    "learning_rate": 2e-5,
    "warmup_steps": 5,
    "loss_aggregation": "token_mean",
    "kl_coefficient": 0.01,
    "kl_estimator": "k3",
    "kl_placement": "loss",
}
"""Also what the two presets choose differently: the estimator and its value model are all that is left to differ."""

NUM_PROMPTS, GROUP_SIZE = 8, 4
GROUPED = {"batch_size": NUM_PROMPTS, "group_size": GROUP_SIZE}
SINGLE = {"batch_size": NUM_PROMPTS * GROUP_SIZE, "group_size": 1}
VALUE = {"value_model": "separate", "value_learning_rate": 1e-4}


@dataclass(frozen=True)
class Configuration:
    name: str
    title: str
    algorithm: str
    differences: dict[str, Any]

    def options(self, steps: int) -> Options:
        """Evaluates before the first step and after the last one, and is too short for resume points."""
        intervals = dict.fromkeys(("max_steps", "eval_interval", "checkpoint_interval", "resume_point_interval"), steps)
        return resolve_options(self.algorithm, {**COMMON, **self.differences, **intervals})


CONFIGURATIONS = (
    Configuration("grpo", "GRPO", "grpo", GROUPED),
    Configuration("ppo", "PPO", "ppo", {**GROUPED, **VALUE}),
    Configuration("ppo_single", "PPO, G = 1", "ppo", {**SINGLE, **VALUE}),
)
"""What is measured against what; the first is what the others are compared with."""


@dataclass(frozen=True)
class Task:
    """One run: `seed` orders the questions and draws the completions."""

    phase: str
    configuration: Configuration
    seed: int
    steps: int
    num_threads: int

    def folder(self, work: Path) -> Path:
        return work / self.phase / f"{self.configuration.name}_{self.seed}"

    def job(self, commit: str) -> ResolvedJob:
        return ResolvedJob(
            job_id=f"benchmark-{commit}",
            attempt=1,
            algorithm=self.configuration.algorithm,
            options=self.configuration.options(self.steps),
            seed=self.seed,
            grader=PythonGrader(type="python", source=LAST_INTEGER),
            model=ModelSource(name=SMOLLM2_NAME, digest=""),
            num_threads=self.num_threads,
        )


def plan(phase: str, steps: int, repeats: int, num_threads: int) -> list[Task]:
    """`repeats` runs of each configuration in turn, each round beginning with another one: what drifts falls on all alike."""
    tasks = []
    for seed in range(1, repeats + 1):
        shift = (seed - 1) % len(CONFIGURATIONS)
        order = CONFIGURATIONS[shift:] + CONFIGURATIONS[:shift]
        tasks += [Task(phase, configuration, seed, steps, num_threads) for configuration in order]
    return tasks


def make_runs(work: Path, tasks: list[Task], commit: str) -> None:
    """Raises: RunFailed."""
    training, held_out = make_rows()
    model = convert_smollm2(work / "models")
    for number, task in enumerate(tasks, 1):
        print(f"run {number}/{len(tasks)}: {task.phase} {task.configuration.title}, seed {task.seed}", flush=True)
        ensure_run(task.folder(work), task.job(commit), model, training, held_out if task.phase == LEARN else [])


def read_columns(work: Path, tasks: list[Task], commit: str) -> list[Column]:
    """What the finished runs among `tasks` measured."""
    done = [task for task in tasks if has_succeeded(task.folder(work), task.job(commit))]
    columns = []
    for configuration in CONFIGURATIONS:
        learned, timed = ([task for task in done if (task.phase, task.configuration) == (phase, configuration)] for phase in (LEARN, TIME))
        column = Column(
            title=configuration.title,
            options=next(task.job(commit).options for task in tasks if task.configuration == configuration and task.phase == LEARN),
            learned=[read_learned(task.folder(work), task.job(commit).options) for task in learned],
            timed=[read_timed(task.folder(work)) for task in timed],
        )
        columns.append(column)
    return columns


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_vs_grpo", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the model and the runs (1 GB)")
    parser.add_argument("--phase", choices=[LEARN, TIME], help="only these runs; both are in the table as far as they are there")
    parser.add_argument("--steps", type=int, default=24, help="of each run that learns")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each configuration that learn")
    parser.add_argument("--rounds", type=int, default=3, help=f"timed runs of each configuration, of {TIMED_STEPS} steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a timed run")
    parser.add_argument("--learn-threads", type=int, default=os.cpu_count(), help="of a run that learns: fewer leave room for other work")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    commit = describe_commit()
    tasks = plan(LEARN, given.steps, given.seeds, given.learn_threads) + plan(TIME, TIMED_STEPS, given.rounds, given.threads)
    make_runs(given.work, [task for task in tasks if given.phase in (None, task.phase)], commit)
    command = " ".join("WORK_FOLDER" if argument == str(given.work) else argument for argument in sys.argv[1:])
    print(f"\nMachine: {describe_machine()}, {given.threads} threads  ")
    print(f"Commit: {commit}  \nCommand: `python -m benchmarks.ppo_vs_grpo {command}`\n")
    print(make_table(read_columns(given.work, tasks, commit)))


if __name__ == "__main__":
    main()
