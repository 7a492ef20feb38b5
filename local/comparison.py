"""Whether two records are of the same run. Reads nothing: what is not written down is not known, and said so."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from core.run_directory import VARIABLE_METRICS
from local.run_records import RunRecord, State


class Verdict(StrEnum):
    SAME = "same"
    PREFIX = "prefix"
    """Equal as far as both go, but one goes further."""

    DIFFERENT = "different"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Comparison:
    verdict: Verdict
    last_equal_step: int = 0
    """Every step up to this one is equal: a digest contains the one before it. 0: none."""

    first_different_step: int | None = None
    different_metrics: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Of that step; None where a side lacks the name. Without those that differ between equal runs, too."""

    different_settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    equal_states: tuple[State, ...] = ()
    different_states: tuple[State, ...] = ()


def compare(a: RunRecord, b: RunRecord) -> Comparison:
    common = sorted(a.digests.keys() & b.digests.keys())
    settings = {name: (a.settings[name], b.settings[name]) for name in a.settings if name in b.settings}
    different_settings = {name: pair for name, pair in settings.items() if pair[0] != pair[1]}
    if not common:
        return Comparison(Verdict.UNKNOWN, different_settings=different_settings)
    first = next((step for step in common if a.digests[step] != b.digests[step]), None)
    states = sorted(a.states.keys() & b.states.keys(), key=lambda state: (state.step, state.kind))
    different_states = tuple(state for state in states if a.states[state] != b.states[state])
    return Comparison(
        verdict=_verdict(a, b, is_different=first is not None or bool(different_states)),
        last_equal_step=max((step for step in common if first is None or step < first), default=0),
        first_different_step=first,
        different_metrics={} if first is None else different_metrics(a, b, first),
        different_settings=different_settings,
        equal_states=tuple(state for state in states if state not in different_states),
        different_states=different_states,
    )


def different_metrics(a: RunRecord, b: RunRecord, step: int) -> dict[str, tuple[float | None, float | None]]:
    ours, theirs = a.read_metrics(step), b.read_metrics(step)
    names = sorted(name for name in ours.keys() | theirs.keys() if not name.startswith(VARIABLE_METRICS))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _verdict(a: RunRecord, b: RunRecord, *, is_different: bool) -> Verdict:
    if is_different:
        return Verdict.DIFFERENT
    return Verdict.SAME if max(a.digests) == max(b.digests) else Verdict.PREFIX
