"""What a grader does with completions that a run may bring, found out through the client that real grading uses.

Calls and looks; it changes nothing and guesses nothing: a probe that could not be made is skipped, never passed.
"""

import asyncio
import math
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from core.grader_specs import EndpointOptions, PinnedEndpointGrader
from graders.grade import Grade, GradeFailure, Grader, GradeRequest, shorten

DEADLINE_SECONDS = 300.0
CALL_SECONDS = 60.0
MAX_ROWS = 20
MAX_TEXTS_PER_ROW = 3
NUM_TIMED = 20
SEQUENTIAL_SECONDS = 60.0
"""How long calls are made one after the other, for one probe."""

NUM_REPEATED = 8
MIN_LOAD_CALLS, MAX_LOAD_CALLS = 20, 200
LOAD_SECONDS = 30.0
SAME_SCORE = 1e-9
PLAIN_TEXT = "I do not know."
LONG_TEXT = "The answer is written somewhere in this very long text. " * 1800
UNICODE_TEXT = "Caf\u00e9 e\u0301 \u2603 \U0001f600 \u05e9\u05dc\u05d5\u05dd \u4f60\u597d \u200b\u202e \x00 \\u0041 </s>"
BUILT_IN_ROW: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}

Outcome = Literal["passed", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """How one probe ended."""

    probe: str
    outcome: Outcome
    message: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeReport:
    findings: list[Finding]
    num_rows: int
    num_calls: int
    seconds: float

    @property
    def passed(self) -> bool:
        """No probe failed and none was left out."""
        return all(finding.outcome in ("passed", "warning") for finding in self.findings)

    @property
    def summary(self) -> str:
        parts = [f"{len(self._named('passed'))} of {len(self.findings)} probes passed"]
        outcomes: tuple[Outcome, ...] = ("failed", "warning", "skipped")
        parts += [f"{outcome}: {', '.join(names)}" for outcome in outcomes if (names := self._named(outcome))]
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "summary": self.summary, **asdict(self)}

    def _named(self, outcome: Outcome) -> list[str]:
        return [finding.probe for finding in self.findings if finding.outcome == outcome]


class Answer(NamedTuple):
    """One completion of one row, and what the grader said to it."""

    item: dict[str, Any]
    text: str
    grade: Grade


def for_probing(spec: PinnedEndpointGrader) -> PinnedEndpointGrader:
    """`spec` asked once and not for long: what fails is to be seen, not repeated away."""
    return spec.model_copy(update={"max_attempts": 1, "timeout_seconds": min(spec.timeout_seconds, CALL_SECONDS)})


async def probe_grader(
    grader: Grader, options: EndpointOptions, rows: Sequence[dict[str, Any]] = (), *, deadline_seconds: float = DEADLINE_SECONDS
) -> ProbeReport:
    """Every probe, in turn, over the first of `rows` (dataset rows; none: one that is built in). Ends at the deadline."""
    started = time.monotonic()
    probes = _Probes(grader, options, list(rows[:MAX_ROWS]) or [BUILT_IN_ROW])
    findings: list[Finding] = []
    reason = "The time for all probes was over."
    try:
        async with asyncio.timeout(deadline_seconds):
            for name, probe in probes.table.items():
                findings.append(await probe(name))
                if probes.is_deaf:
                    reason = "No call was answered with a grade."
                    break
    except TimeoutError:
        pass
    left = list(probes.table)[len(findings) :]
    findings += [Finding(name, "skipped", reason) for name in left]
    return ProbeReport(findings, len(probes.rows), probes.num_calls, time.monotonic() - started)


class _Probes:
    def __init__(self, grader: Grader, options: EndpointOptions, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.num_calls = 0
        self._grader, self._options = grader, options
        self._answers: list[Answer] = []
        self._latencies: list[float] = []
        self.table: dict[str, Callable[[str], Awaitable[Finding]]] = {
            "schema": self._schema,
            "range": self._range,
            "repeatable": self._repeatable,
            **({"batch": self._batch} if str(options.format) != "single" else {}),
            "latency": self._latency,
            "rate": self._rate,
            "empty": self._edge("", "An empty completion"),
            "very_long": self._edge(LONG_TEXT, f"A completion of {len(LONG_TEXT):,} characters"),
            "unicode": self._edge(UNICODE_TEXT, "Accents, emoji, right-to-left text, a NUL and an escape"),
            "prompt_echo": self._edge(None, "A completion that repeats the prompt"),
        }

    @property
    def is_deaf(self) -> bool:
        """Whether there is no use in asking on."""
        return bool(self._answers) and not self._graded()

    async def _schema(self, name: str) -> Finding:
        """The grader answers, and with what the wire format asks for. A score out of range is left to the next probe."""
        ends_at = time.monotonic() + SEQUENTIAL_SECONDS
        for item, text in _completions(self.rows):
            if self._answers and time.monotonic() >= ends_at:
                break
            self._answers.append(await self._timed(item, text))
        grades = [answer.grade for answer in self._answers]
        is_counted = [self.is_deaf or grade.error != GradeFailure.OUT_OF_RANGE for grade in grades]
        return _calls(name, [grade for grade, counts in zip(grades, is_counted, strict=True) if counts])

    async def _range(self, name: str) -> Finding:
        outside = [answer.grade for answer in self._answers if answer.grade.error == GradeFailure.OUT_OF_RANGE]
        if outside:
            return Finding(name, "failed", outside[0].error_message or "")
        scores = self._scores()
        if not scores:
            return Finding(name, "failed", "The grader gave no score: it abstained from every completion.")
        numbers = {"lowest": min(scores), "highest": max(scores)}
        wanted = self._options.reward_range
        bounds = "no 'reward_range' is set" if wanted is None else f"all within {wanted[0]:g} to {wanted[1]:g}"
        if len(scores) > 1 and numbers["lowest"] == numbers["highest"]:
            return Finding(name, "warning", f"Every completion got {scores[0]:g}: there is nothing to learn from that.", numbers)
        return Finding(name, "passed", f"Scores from {numbers['lowest']:g} to {numbers['highest']:g}; {bounds}.", numbers)

    async def _repeatable(self, name: str) -> Finding:
        before = self._graded()[:NUM_REPEATED]
        again = [(await self._timed(answer.item, answer.text)).grade for answer in before]
        return _compared(name, before, again, "asked twice")

    async def _batch(self, name: str) -> Finding:
        """`_answers` came from calls of one completion each; these are asked for at the same time."""
        before = self._graded()
        together = await asyncio.gather(*(self._ask(answer.item, answer.text) for answer in before))
        return _compared(name, before, [answer.grade for answer in together], "graded in a batch and alone")

    async def _latency(self, name: str) -> Finding:
        ends_at = time.monotonic() + SEQUENTIAL_SECONDS
        answers = self._graded()
        grades: list[Grade] = []
        while len(self._latencies) < NUM_TIMED and time.monotonic() < ends_at:
            item, text, _ = answers[len(grades) % len(answers)]
            grades.append((await self._timed(item, text)).grade)
        if any(grade.error is not None for grade in grades):
            return _calls(name, grades)
        numbers = _percentiles(self._latencies)
        return Finding(name, "passed", f"{len(self._latencies)} calls one after the other: {_in_words(numbers)}.", numbers)

    async def _rate(self, name: str) -> Finding:
        """As many calls at a time as a job would make."""
        at_once = self._options.max_concurrency
        wanted = min(MAX_LOAD_CALLS, max(MIN_LOAD_CALLS, 4 * at_once))
        answers, grades = self._graded(), list[Grade]()
        started, begun = time.monotonic(), 0

        async def caller() -> None:
            nonlocal begun
            while begun < wanted and time.monotonic() - started < LOAD_SECONDS:
                item, text, _ = answers[begun % len(answers)]
                begun += 1
                grades.append((await self._ask(item, text)).grade)

        await asyncio.gather(*(caller() for _ in range(at_once)))
        seconds = time.monotonic() - started
        if any(grade.error is not None for grade in grades):
            return _calls(name, grades)
        numbers = {"calls_per_second": len(grades) / seconds, **_percentiles([grade.latency_seconds for grade in grades])}
        message = f"{len(grades)} calls, {at_once} at a time: {numbers['calls_per_second']:.3g} a second; {_in_words(numbers)}."
        return Finding(name, "passed", message, numbers)

    def _edge(self, text: str | None, what: str) -> Callable[[str], Awaitable[Finding]]:
        """Grades one unusual completion; None: the row's own prompt."""

        async def probe(name: str) -> Finding:
            item = self.rows[0]
            grade = (await self._ask(item, _prompt_of(item) if text is None else text)).grade
            if grade.error is not None:
                return Finding(name, "failed", f"{what} could not be graded: {grade.error}: {grade.error_message}")
            if grade.reward is None:
                return Finding(name, "passed", f"{what}: the grader abstains.")
            numbers = {"score": grade.reward}
            scores = self._scores()
            if scores and grade.reward >= max(scores) > min(scores):
                return Finding(
                    name, "warning", f"{what} gets {grade.reward:g}, as much as the best other: a model will find that.", numbers
                )
            return Finding(name, "passed", f"{what} gets {grade.reward:g}.", numbers)

        return probe

    async def _timed(self, item: dict[str, Any], text: str) -> Answer:
        """One call with no other beside it."""
        answer = await self._ask(item, text)
        self._latencies.append(answer.grade.latency_seconds)
        return answer

    async def _ask(self, item: dict[str, Any], text: str) -> Answer:
        self.num_calls += 1
        return Answer(item, text, await self._grader.grade(GradeRequest(item=item, output_text=text)))

    def _graded(self) -> list[Answer]:
        return [answer for answer in self._answers if answer.grade.error is None]

    def _scores(self) -> list[float]:
        return [answer.grade.reward for answer in self._answers if answer.grade.reward is not None]


def _completions(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """(row, text): what a row says beside its messages, often the right answer, and a text that answers nothing."""
    found = []
    for item in rows:
        said = [str(value) for name, value in item.items() if name != "messages" and isinstance(value, str | int | float)]
        found += [(item, text) for text in [PLAIN_TEXT, *said][:MAX_TEXTS_PER_ROW]]
    return found


def _prompt_of(item: dict[str, Any]) -> str:
    messages = item.get("messages") or BUILT_IN_ROW["messages"]
    return str(messages[-1].get("content", ""))


def _calls(name: str, grades: Sequence[Grade]) -> Finding:
    """Whether every call brought a grade; the kinds of failure where not."""
    failures = [grade for grade in grades if grade.error is not None]
    numbers = {"calls": float(len(grades)), "failed_calls": float(len(failures))}
    if not failures:
        abstained = sum(grade.abstained for grade in grades)
        note = f", {abstained} of them without a score" if abstained else ""
        return Finding(name, "passed", f"{len(grades)} calls were answered as they should be{note}.", numbers)
    kinds = ", ".join(f"{kind} ({count})" for kind, count in Counter(grade.error for grade in failures).most_common())
    message = f"{len(failures)} of {len(grades)} calls failed: {kinds}. First: {failures[0].error_message}"
    return Finding(name, "failed", shorten(message, 1000), numbers)


def _compared(name: str, before: Sequence[Answer], after: Sequence[Grade], how: str) -> Finding:
    """Whether two grades of the same completion agree, for each of `before`."""
    if any(grade.error is not None for grade in after):
        return _calls(name, after)
    pairs = [(first.grade.reward, second.reward) for first, second in zip(before, after, strict=True)]
    gaps = [0.0 if a == b else math.inf if a is None or b is None else abs(a - b) for a, b in pairs]
    different = [gap for gap in gaps if gap > SAME_SCORE]
    if not different:
        return Finding(name, "passed", f"{len(pairs)} completions {how} got the same score.", {"compared": float(len(pairs))})
    finite = [gap for gap in different if math.isfinite(gap)]
    largest = {"largest_difference": max(finite)} if finite else {}
    message = f"{len(different)} of {len(pairs)} completions {how} got different scores"
    message += f", by up to {max(finite):g}." if finite else ": a number once, none the other time."
    return Finding(name, "failed", message, {"compared": float(len(pairs)), "different": float(len(different)), **largest})


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """By nearest rank: each is a latency that was measured."""
    ordered = sorted(seconds)
    ranks = {f"p{percent}_seconds": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in (50, 95, 99)}
    return {**ranks, "mean_seconds": statistics.fmean(ordered)}


def _in_words(numbers: dict[str, float]) -> str:
    return ", ".join(f"p{percent} {1000 * numbers[f'p{percent}_seconds']:.3g} ms" for percent in (50, 95, 99))
