"""From the raw rounds of races to tables: medians, ratios of medians, and what they were to be."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contender import Report

PHASES = ("generation", "scoring", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Entry:
    """One contender's rounds."""

    contender: str
    micro_batch: str
    """Rows per forward pass."""

    reports: list[Report]

    def seconds(self, phase: str) -> float:
        """Median over the rounds."""
        return statistics.median(report.seconds[phase] for report in self.reports)

    @property
    def tokens_per_second(self) -> float:
        return self.reports[0].tokens / self.seconds("step")

    @property
    def peak_bytes(self) -> int:
        return max(report.peak_bytes for report in self.reports)


@dataclass(frozen=True)
class Race:
    """The rounds of one configuration."""

    config: str
    ours: Entry
    peer: Entry

    def speed_ratio(self, phase: str = "step") -> float:
        """The peer's median seconds over ours: above 1 we are faster."""
        return self.peer.seconds(phase) / self.ours.seconds(phase)

    @property
    def memory_ratio(self) -> float:
        """Our peak memory over the peer's: below 1 we need less."""
        return self.ours.peak_bytes / self.peer.peak_bytes


@dataclass(frozen=True)
class Goal:
    what: str
    config: str
    wanted: float
    is_at_most: bool = False
    """A memory ratio; others are speed ratios of at least `wanted`."""


GOALS = (
    Goal("whole step, bf16, 64 tokens", "fixed-full-bf16", 3.0),
    Goal("whole step, bf16, drawn lengths", "drawn-full-bf16", 3.5),
    Goal("whole step, float32", "fixed-full-float32", 2.5),
    Goal("peak memory, equal state precision", "fixed-full-amp", 1.0, is_at_most=True),
    Goal("peak memory, peer all in bf16", "fixed-full-bf16", 1.25, is_at_most=True),
)


def make_table(races: Sequence[Race]) -> str:
    """Markdown: two rows for each race."""
    head = [
        "config",
        "contender",
        "micro-batch",
        *(f"{phase} s" for phase in PHASES),
        "step s",
        "min-max",
        "tokens/s",
        "peak GiB",
        "peer / ours",
    ]
    lines = [head, ["---"] * len(head)]
    for race in races:
        lines.append([race.config, *_cells(race.ours), f"**{race.speed_ratio():.2f}**"])
        lines.append(["", *_cells(race.peer), ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_goals(races: Sequence[Race]) -> str:
    """Markdown: what was wanted and what was reached, for the races that were run."""
    by_config = {race.config: race for race in races}
    lines = [["goal", "config", "wanted", "measured", ""], ["---"] * 5]
    for goal in GOALS:
        if goal.config not in by_config:
            continue
        race = by_config[goal.config]
        measured = race.memory_ratio if goal.is_at_most else race.speed_ratio()
        is_reached = measured <= goal.wanted if goal.is_at_most else measured >= goal.wanted
        sign = "<=" if goal.is_at_most else ">="
        lines.append([goal.what, goal.config, f"{sign} {goal.wanted}", f"{measured:.2f}", "reached" if is_reached else "not reached"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(entry: Entry) -> list[str]:
    steps = [report.seconds["step"] for report in entry.reports]
    return [
        entry.contender,
        entry.micro_batch,
        *(f"{entry.seconds(phase):.2f}" for phase in PHASES),
        f"{entry.seconds('step'):.2f}",
        f"{min(steps):.2f}-{max(steps):.2f}",
        f"{entry.tokens_per_second:.0f}",
        f"{entry.peak_bytes / 2**30:.2f}",
    ]


def to_plain(race: Race) -> dict[str, Any]:
    def entry(one: Entry) -> dict[str, Any]:
        return {"contender": one.contender, "micro_batch": one.micro_batch, "reports": [vars(report) for report in one.reports]}

    return {"config": race.config, "ours": entry(race.ours), "peer": entry(race.peer)}


def from_plain(plain: dict[str, Any]) -> Race:
    def entry(one: dict[str, Any]) -> Entry:
        return Entry(one["contender"], one["micro_batch"], [Report(**report) for report in one["reports"]])

    return Race(plain["config"], entry(plain["ours"]), entry(plain["peer"]))
