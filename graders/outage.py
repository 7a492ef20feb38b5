"""A grader that goes away and comes back: noticed, asked again and again, waited for. What a job does meanwhile is not decided here."""

import asyncio
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, repeat

from graders.grade import Grade, Grader, GradeRequest

PROBE_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Waits between probes; the last one repeats."""


@dataclass(frozen=True)
class Outage:
    since: float
    """time.monotonic() of the call that found it."""

    failure: Grade


class Breaker:
    """The grader behind it, called only while it is there.

    A call that fails as an outage is made once more, after the grader has answered a probe. As long as probes fail, `outage` says so
    and calls that have not begun wait. What fails the second time is a failure of its own. Belongs to one event loop.
    """

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self._answered: GradeRequest | None = None
        """What the grader is known to have an answer to: another completion may be what it stumbles over."""

        self._is_heard = asyncio.Event()
        self._is_heard.set()
        self._probing: asyncio.Task[None] | None = None
        self.outage: Outage | None = None
        """Read by other threads."""

    async def grade(self, request: GradeRequest) -> Grade:
        if self.outage is not None and self._answered is not None:
            await self._is_heard.wait()
        first = await self._ask(request)
        if not first.is_outage:
            return first
        await self._wait_for_answer(request, first)
        again = await self._ask(request)
        return replace(again, attempts=first.attempts + again.attempts)

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        await self._grader.close()

    async def _ask(self, request: GradeRequest) -> Grade:
        grade = await self._grader.grade(request)
        if not grade.is_outage:
            self._answered = request
            self._hear()
        return grade

    async def _wait_for_answer(self, request: GradeRequest, failure: Grade) -> None:
        if self._probing is None or self._probing.done():
            self._is_heard.clear()
            self._probing = asyncio.create_task(self._probe(request, Outage(time.monotonic(), failure)))
        await asyncio.shield(self._probing)

    async def _probe(self, request: GradeRequest, outage: Outage) -> None:
        """Ends when the grader has answered something, be it the probe or another call."""
        for seconds in chain(PROBE_SECONDS, repeat(PROBE_SECONDS[-1])):
            answer = await self._grader.grade(probe_request(self._answered or request))
            if not answer.is_outage:
                self._hear()
            if self._is_heard.is_set():
                return
            self.outage = outage
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_heard.wait(), seconds)
                return

    def _hear(self) -> None:
        self.outage = None
        self._is_heard.set()


def probe_request(request: GradeRequest) -> GradeRequest:
    """The same question, marked as a probe and under no completion's name: what is answered to it is thrown away."""
    return replace(request, idempotency_key=secrets.token_hex(32), trace_id="", metadata={**request.metadata, "probe": True})
