"""Sends completions to the grader as they finish and waits for the verdicts. A thread with its own event loop.

A verdict is journaled before it is used. A grade that could not be had never becomes a number.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import chain, repeat
from types import TracebackType
from typing import Any, Self

from core.redaction import Redactor
from core.run_directory import ResolvedJob
from graders.grade import Grade, Grader, GradeRequest, idempotency_key
from graders.outage import Breaker
from trainer.batch import Graded, Rollout
from trainer.config import grader_version
from trainer.journal import Occasion, RewardJournal
from trainer.patience import Announce, Patience

WAIT_SECONDS = 0.2
RETRY_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Before the failures of a step with too many of them are asked again; the last one repeats."""

CLOSE_SECONDS = 10.0


class GradingService:
    """One grader for the life of the run. `open` begins the grading of one set of completions."""

    def __init__(
        self,
        job: ResolvedJob,
        make_grader: Callable[[], Grader],
        journal: RewardJournal,
        redactor: Redactor,
        on_progress: Callable[[], None],
        announce: Announce,
    ) -> None:
        self.job = job
        self.journal = journal
        self.redactor = redactor
        self.version = grader_version(job.grader)
        self.on_progress = on_progress
        self.announce = announce
        self._unwritten: list[tuple[Occasion, str, Grade, asyncio.Future[None]]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grading", daemon=True)
        self._thread.start()
        self.grader = asyncio.run_coroutine_threadsafe(_made(make_grader), self._loop).result()

    def open(self, purpose: str, step: int, round_: int = 0) -> "GradingRound":
        return GradingRound(self, Occasion(self.job.job_id, purpose, step, round_, self.version))

    def submit(self, at: Occasion, rollout: Rollout) -> Future[Grade]:
        """The verdict to come: from the journal if it was given before, else from the grader."""
        known = self.journal.find(at.key(rollout))
        if known is None:
            return self.submit_again(at, rollout)
        answered: Future[Grade] = Future()
        answered.set_result(known)
        return answered

    def submit_again(self, at: Occasion, rollout: Rollout) -> Future[Grade]:
        """The grader's new verdict, which takes the place of an earlier one."""
        return asyncio.run_coroutine_threadsafe(self._grade(at, at.key(rollout), rollout), self._loop)

    def settle(self) -> None:
        """Waits until every verdict that was given stands in the journal."""
        wait([asyncio.run_coroutine_threadsafe(_two_turns(), self._loop)], timeout=CLOSE_SECONDS)

    def close(self) -> None:
        """Gives up what is still open and frees the grader's connections and processes; one that hangs in this is left behind."""
        wait([asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop)], timeout=CLOSE_SECONDS)
        closing = asyncio.run_coroutine_threadsafe(self.grader.close(), self._loop)
        wait([closing], timeout=CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CLOSE_SECONDS)
        self.journal.close()

    async def _grade(self, at: Occasion, key: str, rollout: Rollout) -> Grade:
        grade = await self.grader.grade(_request(self.job, at, rollout))
        written = self._loop.create_future()
        if not self._unwritten:
            self._loop.call_soon(self._write)
        self._unwritten.append((at, key, grade, written))
        await written
        self.on_progress()
        return grade

    def _write(self) -> None:
        """One durable write for all verdicts that came in the same turn of the loop."""
        entries, self._unwritten = self._unwritten, []
        waiting = [written for *_, written in entries if not written.cancelled()]
        try:
            self.journal.write([(at, key, grade) for at, key, grade, _ in entries])
        except OSError as error:
            for written in waiting:
                written.set_exception(error)
            return
        for written in waiting:
            written.set_result(None)


class GradingRound:
    """The completions of one step or evaluation while they are graded. Leaving it early cancels what is still open."""

    def __init__(self, service: GradingService, at: Occasion) -> None:
        self._service = service
        self._at = at
        self._verdicts: dict[tuple[int, int], Future[Grade]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            for verdict in self._verdicts.values():
                verdict.cancel()
            self._service.settle()

    def add(self, rollout: Rollout) -> None:
        self._verdicts[rollout.prompt.index, rollout.g] = self._service.submit(self._at, rollout)

    def collect(self, rollouts: list[Rollout], check: Callable[[], None]) -> list[Graded]:
        """`rollouts` with their verdicts, in the same order. `check` is called every 0.2 s and may raise to stop.

        While the grader is away, or more than `max_grader_failure_fraction` of them failed, this waits and asks for those again.
        Raises: GraderUnavailable when patience is over. What was answered stands in the journal.
        """
        patience = Patience(self._service.job.grader_patience_seconds, self._at.step, self._service.announce)
        for pause in chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1])):
            self._wait(check, patience)
            graded = [self._graded(rollout, self._verdicts[rollout.prompt.index, rollout.g].result()) for rollout in rollouts]
            failures = [entry for entry in graded if entry.error is not None]
            if len(failures) <= self._service.job.options.max_grader_failure_fraction * len(graded):
                patience.end()
                return graded
            if pause > 0:
                patience.begin(time.monotonic(), _summary(failures, graded))
            self._pass_time(pause, check, patience)
            for entry in failures:
                self._verdicts[entry.rollout.prompt.index, entry.rollout.g] = self._service.submit_again(self._at, entry.rollout)
        raise AssertionError("the last pause repeats")

    def _wait(self, check: Callable[[], None], patience: Patience) -> None:
        """Until every verdict is there. Raises: GraderUnavailable."""
        waiting = set(self._verdicts.values())
        while waiting:
            self._tick(check, patience)
            _, waiting = wait(waiting, timeout=WAIT_SECONDS)
        check()

    def _pass_time(self, seconds: float, check: Callable[[], None], patience: Patience) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._tick(check, patience)
            time.sleep(min(left, WAIT_SECONDS))

    def _tick(self, check: Callable[[], None], patience: Patience) -> None:
        check()
        outage = self._service.grader.outage
        if outage is None:
            patience.follow(None, "")
        else:
            message = self._service.redactor.clean_optional(outage.failure.error_message)
            patience.follow(outage.since, f"the grader does not answer ({outage.failure.error}). {message}")
        if patience.is_waiting:
            self._service.on_progress()

    def _graded(self, rollout: Rollout, grade: Grade) -> Graded:
        clean = self._service.redactor.clean_optional
        return Graded(
            rollout=rollout,
            reward=grade.reward,
            sub_scores=grade.sub_scores,
            explanation=clean(grade.explanation),
            error=grade.error,
            error_message=clean(grade.error_message),
            failed_member=grade.failed_member,
            attempts=grade.attempts,
            latency_seconds=grade.latency_seconds,
        )


def _summary(failures: list[Graded], graded: list[Graded]) -> str:
    kinds = ", ".join(f"{kind}: {count}" for kind, count in Counter(entry.error for entry in failures).most_common())
    return f"{len(failures)} of {len(graded)} completions could not be graded ({kinds}). First: {failures[0].error_message}"


async def _made(make_grader: Callable[[], Grader]) -> Breaker:
    return Breaker(make_grader())


async def _cancel_others() -> None:
    """Every call that nobody will wait for: those of a step that was sampled ahead."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _two_turns() -> None:
    """Ends after all that was ready in the loop, and the write which that called for."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def _request(job: ResolvedJob, at: Occasion, rollout: Rollout) -> GradeRequest:
    key = idempotency_key(
        job_id=at.job_id,
        phase=at.purpose,
        step=at.step,
        prompt_index=rollout.prompt.index,
        g=rollout.g,
        grader_version=at.grader_version,
        completion=rollout.text,
    )
    return GradeRequest(
        item=rollout.prompt.item,
        output_text=rollout.text,
        output_json=None if job.response_format is None else _parsed(rollout.text),
        finish_reason=rollout.finish_reason,
        trace_id=hashlib.sha256(f"{key}/trace".encode()).hexdigest()[:32],
        idempotency_key=key,
        metadata={"job_id": job.job_id, "step": at.step, "attempt": job.attempt, "grader_version": at.grader_version},
    )


def _parsed(text: str) -> Any | None:
    """`text` as JSON; None where it is not, which graders see as a missing `output_json`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
