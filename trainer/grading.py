"""Sends completions to the grader as they finish and waits for the verdicts. A thread with its own event loop.

A verdict is journaled before it is used. A grade that could not be had never becomes a number.
"""

import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self

from core.errors import GraderUnavailable
from core.redaction import Redactor
from core.run_directory import ResolvedJob
from graders.grade import Grade, Grader, GradeRequest, idempotency_key
from trainer.batch import Graded, Rollout
from trainer.config import grader_version
from trainer.journal import Occasion, RewardJournal

WAIT_SECONDS = 0.2
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
    ) -> None:
        self.job = job
        self.journal = journal
        self.redactor = redactor
        self.version = grader_version(job.grader)
        self._on_progress = on_progress
        self._unwritten: list[tuple[Occasion, str, Grade, asyncio.Future[None]]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grading", daemon=True)
        self._thread.start()
        self._grader = asyncio.run_coroutine_threadsafe(_made(make_grader), self._loop).result()

    def open(self, purpose: str, step: int, round_: int = 0) -> "GradingRound":
        return GradingRound(self, Occasion(self.job.job_id, purpose, step, round_, self.version))

    def submit(self, at: Occasion, rollout: Rollout) -> Future[Grade]:
        """The verdict to come: from the journal if it was given before, else from the grader."""
        key = at.key(rollout)
        known = self.journal.find(key)
        if known is None:
            return asyncio.run_coroutine_threadsafe(self._grade(at, key, rollout), self._loop)
        answered: Future[Grade] = Future()
        answered.set_result(known)
        return answered

    def settle(self) -> None:
        """Waits until every verdict that was given stands in the journal."""
        wait([asyncio.run_coroutine_threadsafe(_two_turns(), self._loop)], timeout=CLOSE_SECONDS)

    def close(self) -> None:
        """Gives up what is still open and frees the grader's connections and processes; one that hangs in this is left behind."""
        wait([asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop)], timeout=CLOSE_SECONDS)
        closing = asyncio.run_coroutine_threadsafe(self._grader.close(), self._loop)
        wait([closing], timeout=CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CLOSE_SECONDS)
        self.journal.close()

    async def _grade(self, at: Occasion, key: str, rollout: Rollout) -> Grade:
        grade = await self._grader.grade(_request(self.job, at, rollout))
        written = self._loop.create_future()
        if not self._unwritten:
            self._loop.call_soon(self._write)
        self._unwritten.append((at, key, grade, written))
        await written
        self._on_progress()
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

        Raises: GraderUnavailable where more than `max_grader_failure_fraction` of them failed.
        """
        waiting = set(self._verdicts.values())
        while waiting:
            check()
            _, waiting = wait(waiting, timeout=WAIT_SECONDS)
        check()
        graded = [self._graded(rollout, self._verdicts[rollout.prompt.index, rollout.g].result()) for rollout in rollouts]
        self._check_failures(graded)
        return graded

    def _graded(self, rollout: Rollout, grade: Grade) -> Graded:
        clean = self._service.redactor.clean_optional
        return Graded(
            rollout=rollout,
            reward=grade.reward,
            sub_scores=grade.sub_scores,
            explanation=clean(grade.explanation),
            error=grade.error,
            error_message=clean(grade.error_message),
            attempts=grade.attempts,
            latency_seconds=grade.latency_seconds,
        )

    def _check_failures(self, graded: list[Graded]) -> None:
        failures = [entry for entry in graded if entry.error is not None]
        if len(failures) <= self._service.job.options.max_grader_failure_fraction * len(graded):
            return
        self._service.journal.forget_failures(self._at.purpose, self._at.step)
        kinds = ", ".join(f"{kind}: {count}" for kind, count in Counter(entry.error for entry in failures).most_common())
        raise GraderUnavailable(
            f"{len(failures)} of {len(graded)} completions could not be graded in step {self._at.step} ({kinds}). "
            f"First: {failures[0].error_message}"
        )


async def _made(make_grader: Callable[[], Grader]) -> Grader:
    return make_grader()


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
