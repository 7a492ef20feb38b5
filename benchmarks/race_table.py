"""From the raw rounds of races to tables: medians, ratios of medians, and what they were to be."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contender import Report
from benchmarks.phases import PHASES


@dataclass(frozen=True)
class Entry:
    """One contender's rounds."""

    contender: str
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

    @property
    def speed_ratio(self) -> float:
        """The peer's median step over ours: above 1 we are faster."""
        return self.peer.seconds("step") / self.ours.seconds("step")

    @property
    def memory_ratio(self) -> float:
        """Our peak memory over the peer's: below 1 we need less."""
        return self.ours.peak_bytes / self.peer.peak_bytes


@dataclass(frozen=True)
class Goal:
    """A speed ratio of at least `wanted`, or a memory ratio of at most that."""

    what: str
    config: str
    wanted: float
    is_memory: bool = False

    def measured(self, race: Race) -> float:
        return race.memory_ratio if self.is_memory else race.speed_ratio

    def is_reached(self, race: Race) -> bool:
        return self.measured(race) <= self.wanted if self.is_memory else self.measured(race) >= self.wanted


def make_table(races: Sequence[Race]) -> str:
    """Markdown: two rows for each race, with the phases that its contenders reported."""
    phases = [phase for phase in PHASES if any(phase in race.ours.reports[0].seconds for race in races)]
    head = ["config", "contender", *(f"{phase} s" for phase in phases), "whole s", "min-max", "tokens/s", "peak GiB", "peer / ours"]
    rows = []
    for race in races:
        rows.append([race.config, *_cells(race.ours, phases), f"**{race.speed_ratio:.2f}**"])
        rows.append(["", *_cells(race.peer, phases), ""])
    return _markdown(head, rows)


def make_goals(races: Sequence[Race], goals: Sequence[Goal]) -> str:
    """Markdown: what was wanted and what was reached, for the races that were run."""
    by_config = {race.config: race for race in races}
    rows = []
    for goal in goals:
        if goal.config in by_config:
            race = by_config[goal.config]
            wanted = f"{'<=' if goal.is_memory else '>='} {goal.wanted}"
            rows.append([goal.what, goal.config, wanted, f"{goal.measured(race):.2f}", "yes" if goal.is_reached(race) else "no"])
    return _markdown(["goal", "config", "wanted", "measured", "reached"], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _cells(entry: Entry, phases: list[str]) -> list[str]:
    steps = [report.seconds["step"] for report in entry.reports]
    return [
        entry.contender,
        *(f"{entry.seconds(phase):.2f}" for phase in phases),
        f"{entry.seconds('step'):.2f}",
        f"{min(steps):.2f}-{max(steps):.2f}",
        f"{entry.tokens_per_second:.0f}",
        f"{entry.peak_bytes / 2**30:.2f}",
    ]


class Record:
    """The races of one commit in a JSON file: a table can be printed again without running them."""

    def __init__(self, path: Path, commit: str) -> None:
        self._path, self._commit = path, commit

    def races(self) -> list[Race]:
        """Those of this commit; others have no place in its table."""
        plain = json.loads(self._path.read_text()) if self._path.exists() else {"commit": self._commit, "races": []}
        return [_from_plain(race) for race in plain["races"]] if plain["commit"] == self._commit else []

    def add(self, race: Race) -> None:
        """In place of an earlier one of the same configuration."""
        races = {one.config: one for one in self.races()} | {race.config: race}
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps({"commit": self._commit, "races": [_to_plain(one) for one in races.values()]}, indent=1))
        aside.replace(self._path)


def _to_plain(race: Race) -> dict[str, Any]:
    sides = {"ours": race.ours, "peer": race.peer}
    plain = {side: {"contender": one.contender, "reports": [vars(report) for report in one.reports]} for side, one in sides.items()}
    return {"config": race.config, **plain}


def _from_plain(plain: dict[str, Any]) -> Race:
    ours, peer = (Entry(plain[side]["contender"], [Report(**report) for report in plain[side]["reports"]]) for side in ("ours", "peer"))
    return Race(plain["config"], ours, peer)
