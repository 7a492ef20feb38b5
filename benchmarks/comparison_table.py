"""From the runs of a comparison to its one table: a row for each measure, a column for each configuration, ratios to the first."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trainer_runs import read_metrics
from core.options import Options
from core.run_directory import SAMPLES
from examples.demo.comparison import Comparison, compare, row_rewards

WARM_UP_STEPS = 2
"""First steps of a run that are not timed: memory is taken and kernels are chosen there."""

PHASES = ("seconds_rollout", "seconds_scoring", "seconds_update")
Rewards = dict[int, float]
"""Held-out question -> mean reward of its completions."""


@dataclass(frozen=True)
class Learned:
    """What one run taught."""

    before: Rewards
    after: Rewards


@dataclass(frozen=True)
class Timed:
    """What the steps of one run cost."""

    steps: list[dict[str, float]]
    """The metrics of each timed step."""

    @property
    def peak_memory_bytes(self) -> float:
        return max(step["peak_memory_bytes"] for step in self.steps)


@dataclass(frozen=True)
class Column:
    """A configuration with all its runs; empty lists where there are none yet."""

    title: str
    options: Options
    learned: list[Learned]
    timed: list[Timed]


def read_learned(folder: Path, options: Options) -> Learned:
    assert options.max_steps is not None
    samples = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    held_out = [sample for sample in samples if sample["phase"] == "valid"]
    first, last = ([sample for sample in held_out if sample["step"] == step] for step in (0, options.max_steps))
    return Learned(row_rewards(first, options.eval_samples), row_rewards(last, options.eval_samples))


def read_timed(folder: Path) -> Timed:
    return Timed([line.values for line in read_metrics(folder, "train")[WARM_UP_STEPS:]])


def models_held(options: Options) -> list[str]:
    """The language models in memory during training; full fine-tuning shares no weights between them."""
    assert options.finetuning == "full", "adapters share one base"
    is_held = {"policy": True, "reference": options.needs_reference, "value": options.value_model == "separate"}
    return [name for name, held in is_held.items() if held]


def make_table(columns: Sequence[Column]) -> str:
    """Markdown. The first column is what the others are compared with."""
    base = columns[0]
    rows: list[tuple[str, Callable[[Column], str]]] = [
        ("prompts x completions per step", lambda column: f"{column.options.batch_size} x {column.options.group_size}"),
        ("models held", lambda column: f"{len(models_held(column.options))} ({', '.join(models_held(column.options))})"),
        ("held-out reward before", lambda column: _mean_and_each([run.before for run in column.learned])),
        (f"held-out reward after {base.options.max_steps} steps", lambda column: _mean_and_each([run.after for run in column.learned])),
        ("rise, 95 % interval", _rise),
        (f"after, against {base.title}, 95 % interval", lambda column: _against(base, column)),
        ("seconds per step", lambda column: _ratio(base, column, lambda timed: _median(timed, "seconds_step"), "s")),
        ("of which rollout, scoring, update", _phases),
        ("peak memory", lambda column: _ratio(base, column, _peak_gigabytes, "GB")),
    ]
    lines = [["", *(column.title for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(column) for column in columns)] for name, cell in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_over_seeds(runs: list[Rewards]) -> Rewards:
    """The mean reward of each question over runs that all hold the same questions."""
    return {row: statistics.fmean(run[row] for run in runs) for row in runs[0]}


def _mean_and_each(runs: list[Rewards]) -> str:
    if not runs:
        return "-"
    means = [statistics.fmean(run.values()) for run in runs]
    return f"{statistics.fmean(means):.3f} ({', '.join(f'{mean:.3f}' for mean in means)})"


def _rise(column: Column) -> str:
    if not column.learned:
        return "-"
    before = mean_over_seeds([run.before for run in column.learned])
    return _with_interval(compare(before, mean_over_seeds([run.after for run in column.learned])))


def _against(base: Column, column: Column) -> str:
    if column is base or not base.learned or not column.learned:
        return "-"
    ours, theirs = (mean_over_seeds([run.after for run in side.learned]) for side in (column, base))
    return _with_interval(compare(theirs, ours))


def _with_interval(comparison: Comparison) -> str:
    return f"{comparison.rise:+.3f} ({comparison.lower:+.3f} to {comparison.upper:+.3f})"


def _ratio(base: Column, column: Column, measure: Callable[[list[Timed]], float], unit: str) -> str:
    if not column.timed or not base.timed:
        return "-"
    value = measure(column.timed)
    beside = "" if column is base else f" ({value / measure(base.timed):.2f} x)"
    return f"{value:.2f} {unit}{beside}"


def _phases(column: Column) -> str:
    return " + ".join(f"{_median(column.timed, name):.2f}" for name in PHASES) if column.timed else "-"


def _median(timed: list[Timed], name: str) -> float:
    return statistics.median(step[name] for run in timed for step in run.steps)


def _peak_gigabytes(timed: list[Timed]) -> float:
    return statistics.median(run.peak_memory_bytes for run in timed) / 1e9
