"""`hone verify-run`: are two runs the same run, and if not, where do they part?"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from client.errors import ClientError
from core.errors import PlatformError
from local.comparison import Comparison, Verdict, compare
from local.run_records import RunRecord, State, read_run

EXIT_CODES = {Verdict.SAME: 0, Verdict.DIFFERENT: 1, Verdict.UNKNOWN: 2, Verdict.PREFIX: 3}


def verify_run(
    a: Annotated[str, typer.Argument(help="A run directory or the id of a job.")],
    b: Annotated[str, typer.Argument(help="The same.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of words.")] = False,
) -> None:
    """Compares two runs by the chained digests of their steps and the hashes of their weights and optimizers.

    Exit code: 0 the same run, 1 different, 2 cannot tell, 3 the same as far as both go, but one is shorter.
    """
    try:
        first, second = read_run(a), read_run(b)
        comparison = compare(first, second)
    except (ClientError, PlatformError) as error:
        typer.echo(json.dumps({"verdict": Verdict.UNKNOWN, "reason": str(error)}) if as_json else f"Cannot tell: {error}")
        raise typer.Exit(EXIT_CODES[Verdict.UNKNOWN]) from error
    if as_json:
        typer.echo(json.dumps(facts(first, second, comparison), indent=2))
    else:
        typer.echo("\n".join(words(first, second, comparison)))
    raise typer.Exit(EXIT_CODES[comparison.verdict])


def facts(a: RunRecord, b: RunRecord, comparison: Comparison) -> dict[str, Any]:
    """What `--json` prints."""
    runs = {
        name: {"name": run.name, "steps": len(run.digests), "last_step": max(run.digests, default=None)}
        for name, run in (("a", a), ("b", b))
    }
    states = {name: [state._asdict() for state in getattr(comparison, name)] for name in ("equal_states", "different_states")}
    return {**runs, **asdict(comparison), **states}


def words(a: RunRecord, b: RunRecord, comparison: Comparison) -> Iterator[str]:
    """The lines that say what was found, the verdict first."""
    yield _sentence(a, b, comparison)
    for letter, run in (("A", a), ("B", b)):
        yield f"  {letter}  {run.name}: {_steps(run)}"
    if comparison.different_states:
        yield f"Weights or optimizers differ: {_states(comparison.different_states)}."
    if comparison.equal_states:
        yield f"Weights and optimizers are equal: {_states(comparison.equal_states)}."
    if comparison.verdict in (Verdict.SAME, Verdict.PREFIX) and not _is_last_state_known(comparison):
        yield f"What the update of step {comparison.last_equal_step} made of the weights is not compared: no state hash on both sides."
    if comparison.first_different_step is not None:
        yield from _table(f"Metrics of step {comparison.first_different_step} that differ", comparison.different_metrics)
    if comparison.different_settings:
        yield from _table("Settings that differ", comparison.different_settings)


def _sentence(a: RunRecord, b: RunRecord, comparison: Comparison) -> str:
    equal, different = comparison.last_equal_step, comparison.first_different_step
    if comparison.verdict == Verdict.UNKNOWN:
        return "Cannot tell: they have no step in common."
    if comparison.verdict == Verdict.SAME:
        return f"The same run: every step up to {equal}, the last of both, is equal."
    if comparison.verdict == Verdict.PREFIX:
        shorter = "A" if max(a.digests) < max(b.digests) else "B"
        return f"The same run as far as both go: every step up to {equal} is equal, where {shorter} ends."
    if different is None:
        return f"Different runs: every step up to {equal} is equal, but weights or optimizers are not."
    before = f"every step up to {equal} is equal" if equal else "no step is equal"
    return f"Different runs: {before}, {'step' if different == equal + 1 else 'the next step in common,'} {different} differs."


def _is_last_state_known(comparison: Comparison) -> bool:
    return any(state.step >= comparison.last_equal_step for state in comparison.equal_states)


def _steps(run: RunRecord) -> str:
    return f"steps {min(run.digests)} to {max(run.digests)}" if run.digests else "no step with a digest"


def _states(states: tuple[State, ...]) -> str:
    return ", ".join(f"{state.kind.replace('_', ' ')} of step {state.step}" for state in states)


def _table(title: str, pairs: dict[str, tuple[Any, Any]]) -> Iterator[str]:
    """A line per name with both values; says so where there is none."""
    yield f"{title}:" if pairs else f"{title}: none that is recorded."
    width = max((len(name) for name in pairs), default=0)
    for name, (ours, theirs) in pairs.items():
        yield f"  {name:<{width}}  A {_shown(ours)}  B {_shown(theirs)}"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
