import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.errors import GraderUnavailable
from core.grader_specs import PinnedEndpointGrader, StringCheckGrader
from core.presets import resolve_options
from core.redaction import Redactor, secret_values
from core.run_directory import REWARDS, Control, ModelSource, ResolvedJob
from graders.grade import Grade, GradeRequest
from tests.trainer.runs import FunctionGrader
from trainer.batch import Graded, Prompt, Rollout
from trainer.config import grader_version
from trainer.control import StopRequested
from trainer.grading import GradingService
from trainer.journal import Occasion, RewardJournal
from trainer.patience import Announce

JOB = ResolvedJob(
    job_id="ftjob-1",
    attempt=2,
    algorithm="grpo",
    options=resolve_options("grpo", {"max_grader_failure_fraction": 0.5}),
    seed=1,
    grader=StringCheckGrader(type="string_check", input="", reference="", operation="eq"),
    response_format={"type": "json_object"},
    model=ModelSource(name="m", digest=""),
)
SECRETS = {"inline": {"headers": {"Authorization": "Bearer topsecret99"}, "signing_secret": None}}


def rollout(index: int = 0, g: int = 0, text: str = "abc", tokens: tuple[int, ...] = (1, 2)) -> Rollout:
    return Rollout(Prompt(index, (1,), "p", {"answer": index}), g, tokens, (0.0,) * len(tokens), "stop", text)


@contextmanager
def service(
    path: Path, grader: object, job: ResolvedJob = JOB, announce: Announce = lambda *told, **data: None
) -> Iterator[GradingService]:
    redactor = Redactor(secret_values(SECRETS))
    running = GradingService(job, lambda: grader, RewardJournal(path / REWARDS), redactor, lambda: None, announce)  # type: ignore[arg-type,return-value]
    try:
        yield running
    finally:
        running.close()


def grade_all(running: GradingService, rollouts: list[Rollout], step: int = 1, purpose: str = "rollout") -> list[Graded]:
    with running.open(purpose, step) as verdicts:
        for one in reversed(rollouts):
            verdicts.add(one)
        return verdicts.collect(rollouts, lambda: None)


def journal_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (path / REWARDS).read_text().splitlines()]


def failing(request: GradeRequest) -> Grade:
    return Grade(reward=None, error="grader_timeout", error_message="Bearer topsecret99 was refused")


def test_verdicts_come_in_the_order_of_the_rollouts_and_stand_in_the_journal(tmp_path: Path) -> None:
    grader = FunctionGrader(lambda request: float(request.item["answer"]))
    with service(tmp_path, grader) as running:
        found = grade_all(running, [rollout(index) for index in range(5)])
    assert [entry.reward for entry in found] == [0, 1, 2, 3, 4]
    assert sorted(line["reward"] for line in journal_lines(tmp_path)) == [0, 1, 2, 3, 4]  # type: ignore[type-var]


def test_a_request_carries_the_row_the_parsed_answer_and_a_stable_idempotency_key(tmp_path: Path) -> None:
    grader = FunctionGrader(lambda request: 1.0)
    with service(tmp_path, grader) as running:
        grade_all(running, [rollout(3, 1, '{"a": 1}'), rollout(4, 0, "no json", tokens=(3,))], step=9)
    requests = {request.item["answer"]: request for request in grader.requests}
    assert (requests[3].output_json, requests[4].output_json) == ({"a": 1}, None)
    assert requests[3].metadata == {"job_id": "ftjob-1", "step": 9, "attempt": 2, "grader_version": grader_version(JOB.grader)}
    assert len({request.idempotency_key for request in grader.requests}) == 2


def test_what_the_journal_knows_is_not_asked_again_but_another_completion_step_or_purpose_is(tmp_path: Path) -> None:
    with service(tmp_path, FunctionGrader(lambda request: 0.25)) as running:
        grade_all(running, [rollout()])
    again = FunctionGrader(lambda request: 0.75)
    with service(tmp_path, again) as running:
        assert grade_all(running, [rollout()])[0].reward == 0.25
        assert again.requests == []
        assert grade_all(running, [rollout(tokens=(1, 3))])[0].reward == 0.75
        assert grade_all(running, [rollout()], step=2)[0].reward == 0.75
        assert grade_all(running, [rollout()], purpose="evaluation")[0].reward == 0.75
        assert grade_all(running, [rollout(g=1)])[0].reward == 0.75


def test_another_version_of_the_grader_is_asked_again(tmp_path: Path) -> None:
    with service(tmp_path, FunctionGrader(lambda request: 0.25)) as running:
        grade_all(running, [rollout()])
    changed = JOB.model_copy(update={"grader": StringCheckGrader(type="string_check", input="", reference="", operation="ne")})
    with service(tmp_path, FunctionGrader(lambda request: 0.75), changed) as running:
        assert grade_all(running, [rollout()])[0].reward == 0.75


def test_the_version_of_an_endpoint_is_the_pinned_one() -> None:
    spec = PinnedEndpointGrader(type="endpoint", url="https://x.example", secret_ref="grader_a@3", grader_version="grader_a@3")
    assert grader_version(spec) == "grader_a@3"


def test_failed_and_abstained_have_no_reward_and_only_failures_count_against_the_bound(tmp_path: Path) -> None:
    grader = FunctionGrader(lambda request: Grade(reward=None, abstained=True))
    with service(tmp_path, grader) as running:
        found = grade_all(running, [rollout(index) for index in range(4)])
    assert [(entry.reward, entry.error) for entry in found] == [(None, None)] * 4


def test_up_to_the_bound_failures_are_carried_and_above_it_the_grader_counts_as_away(tmp_path: Path) -> None:
    def grade(request: GradeRequest) -> Grade | float:
        return failing(request) if request.item["answer"] < 2 else 1.0

    with service(tmp_path, FunctionGrader(grade)) as running:
        found = grade_all(running, [rollout(index) for index in range(4)])
        assert [entry.error for entry in found] == ["grader_timeout", "grader_timeout", None, None]
        with pytest.raises(GraderUnavailable, match=r"Step 2: 2 of 3 completions could not be graded \(grader_timeout: 2\)") as caught:
            grade_all(running, [rollout(index) for index in range(3)], step=2)
    assert "topsecret99" not in caught.value.message
    assert "topsecret99" not in str(found)


def test_failures_of_the_step_that_paused_are_asked_again_and_its_rewards_are_not(tmp_path: Path) -> None:
    rollouts = [rollout(index) for index in range(3)]
    first = FunctionGrader(lambda request: 0.5 if request.item["answer"] == 0 else failing(request))
    with service(tmp_path, first) as running, pytest.raises(GraderUnavailable):
        grade_all(running, rollouts)
    second = FunctionGrader(lambda request: 1.0)
    with service(tmp_path, second) as running:
        assert [entry.reward for entry in grade_all(running, rollouts)] == [0.5, 1.0, 1.0]
    assert {request.item["answer"] for request in second.requests} == {1, 2}


PATIENT = JOB.model_copy(update={"grader_patience_seconds": 60.0})


class Events:
    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        """(level, code)"""
        self.messages: list[str] = []

    def __call__(self, message: str, level: str = "info", *, data: dict[str, Any] | None = None) -> None:
        self.told.append((level, (data or {})["code"]))
        self.messages.append(message)


WAITED = [("warn", "grader_unavailable"), ("info", "grader_available")]


def test_too_many_failures_are_asked_again_until_they_are_few_and_nothing_else_is(tmp_path: Path) -> None:
    events, asked = Events(), Counter[int]()

    def grade(request: GradeRequest) -> Grade | float:
        index = request.item["answer"]
        asked[index] += 1
        return Grade(reward=None, error="grader_invalid_score") if index < 3 and asked[index] < 3 else 1.0 + index

    with service(tmp_path, FunctionGrader(grade), PATIENT, events) as running:
        found = grade_all(running, [rollout(index) for index in range(4)])
    assert [entry.reward for entry in found] == [1.0, 2.0, 3.0, 4.0]
    assert asked == {0: 3, 1: 3, 2: 3, 3: 1}
    assert events.told == WAITED
    assert "3 of 4 completions could not be graded (grader_invalid_score: 3)" in events.messages[0]
    with service(tmp_path, FunctionGrader(failing)) as running:
        assert [entry.reward for entry in grade_all(running, [rollout(index) for index in range(4)])] == [1.0, 2.0, 3.0, 4.0]


def test_a_grader_that_is_away_is_waited_for_and_the_step_goes_on(tmp_path: Path) -> None:
    events = Events()

    def grade(request: GradeRequest) -> Grade | float:
        return 0.5 if events.told else failing(request)

    with service(tmp_path, FunctionGrader(grade), PATIENT, events) as running:
        found = grade_all(running, [rollout(index) for index in range(3)])
    assert [entry.reward for entry in found] == [0.5, 0.5, 0.5]
    assert events.told == WAITED
    assert "grader_timeout" in events.messages[0]
    assert "topsecret99" not in events.messages[0]


def test_one_call_that_finds_the_grader_away_waits_too_however_few_it_is(tmp_path: Path) -> None:
    """Else the last completion of a step would be lost to an outage, which no other run knows of."""
    events = Events()

    def grade(request: GradeRequest) -> Grade | float:
        is_away = not events.told and len(grader.requests) > 9
        return failing(request) if is_away else 0.5

    grader = FunctionGrader(grade)
    with service(tmp_path, grader, PATIENT, events) as running:
        found = grade_all(running, [rollout(index) for index in range(10)])
    assert [entry.reward for entry in found] == [0.5] * 10
    assert events.told == WAITED


def test_when_patience_is_over_what_was_graded_stands_in_the_journal(tmp_path: Path) -> None:
    job = JOB.model_copy(update={"grader_patience_seconds": 0.3})
    events = Events()

    def grade(request: GradeRequest) -> Grade | float:
        return 0.5 if len(grader.requests) <= 2 else failing(request)

    grader = FunctionGrader(grade)
    rollouts = [rollout(index) for index in range(5)]
    with service(tmp_path, grader, job, events) as running, pytest.raises(GraderUnavailable, match="does not answer"):
        grade_all(running, rollouts)
    assert events.told == WAITED[:1]
    assert [line["reward"] for line in journal_lines(tmp_path)] == [0.5, 0.5]
    again = FunctionGrader(lambda request: 0.75)
    with service(tmp_path, again) as running:
        assert sorted(entry.reward or 0 for entry in grade_all(running, rollouts)) == [0.5, 0.5, 0.75, 0.75, 0.75]


class HangingGrader:
    """Answers nothing; notes whether it was told to give up."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.cancelled = threading.Event()

    async def grade(self, request: GradeRequest) -> Grade:
        self.started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Grade(reward=1.0)

    async def close(self) -> None:
        pass


def test_a_request_to_stop_is_honoured_while_a_grader_hangs(tmp_path: Path) -> None:
    grader = HangingGrader()

    def stop_once_started() -> None:
        if grader.started.is_set():
            raise StopRequested(Control.CANCEL)

    def collect(running: GradingService) -> None:
        with running.open("rollout", 1) as verdicts:
            verdicts.add(rollout())
            verdicts.collect([rollout()], stop_once_started)

    with service(tmp_path, grader) as running:
        begin = time.monotonic()
        with pytest.raises(StopRequested):
            collect(running)
        assert grader.cancelled.wait(timeout=5)
        assert time.monotonic() - begin < 2


def test_a_bug_in_a_grader_is_not_a_grade(tmp_path: Path) -> None:
    def broken(request: GradeRequest) -> float:
        raise ZeroDivisionError("a bug")

    with service(tmp_path, FunctionGrader(broken)) as running, pytest.raises(ZeroDivisionError):
        grade_all(running, [rollout()])


def test_a_journal_that_cannot_be_written_stops_the_run_instead_of_hanging_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RewardJournal, grades: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RewardJournal, "write", full)
    with service(tmp_path, FunctionGrader(lambda request: 1.0)) as running, pytest.raises(OSError, match="No space"):
        grade_all(running, [rollout()])


def at(step: int, purpose: str = "rollout") -> Occasion:
    return Occasion("ftjob-1", purpose, step, 0, "v")


def test_a_torn_last_line_of_the_journal_is_dropped(tmp_path: Path) -> None:
    journal = RewardJournal(tmp_path / REWARDS)
    journal.write([(at(1), "a", Grade(reward=1.0, sub_scores={"x": 0.5}, explanation="why"))])
    journal.close()
    with open(tmp_path / REWARDS, "a") as file:
        file.write('{"key": "b", "rew')
    reopened = RewardJournal(tmp_path / REWARDS)
    assert reopened.find("a") == Grade(reward=1.0, sub_scores={"x": 0.5}, explanation="why")
    assert reopened.find("b") is None


def test_a_resume_point_carries_the_verdicts_of_unfinished_work_only(tmp_path: Path) -> None:
    journal = RewardJournal(tmp_path / REWARDS)
    entries = [(at(1), "old"), (at(2), "done"), (at(2, "evaluation"), "open evaluation"), (at(3), "open step")]
    journal.write([(occasion, key, Grade(reward=0.0)) for occasion, key in entries])
    assert [line["key"] for line in journal.lines_after(2)] == ["open evaluation", "open step"]
    journal.forget_steps(2)
    assert [key for _, key in entries if journal.find(key)] == ["open step"]
