"""Puts the completions that wait at the same time into one call. Who is cancelled takes nobody else with it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field

from graders.formats import Asked
from graders.grade import Grade

GATHER_SECONDS = 0.02
"""How long a call that is not full waits for more, once it could begin."""


@dataclass
class _Group:
    """One call: first looking for a place, then on its way."""

    members: "list[tuple[Asked, asyncio.Future[Grade]]]" = field(default_factory=list)
    task: "asyncio.Task[list[Grade]] | None" = None


class Grouper:
    """Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        size: int,
        place: Callable[[], AbstractAsyncContextManager[None]],
        send: Callable[[list[Asked]], Awaitable[list[Grade]]],
    ) -> None:
        self._size = size
        self._place = place
        self._send = send
        self._waiting: list[tuple[Asked, asyncio.Future[Grade]]] = []
        self._is_full = asyncio.Event()
        self._next: _Group | None = None
        """The group that looks for a place; what comes meanwhile joins it."""
        self._groups: list[_Group] = []

    async def grade(self, asked: Asked) -> Grade:
        """Raises: LimitsUnavailable."""
        answer: asyncio.Future[Grade] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if len(self._waiting) >= self._size:
            self._is_full.set()
        if self._next is None:
            self._start()
        try:
            return await answer
        finally:
            if answer.cancelled():
                self._leave_alone()

    async def close(self) -> None:
        tasks = [group.task for group in self._groups if group.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self) -> None:
        group = _Group()
        self._next = group
        self._groups.append(group)
        group.task = asyncio.create_task(self._ask(group))
        group.task.add_done_callback(lambda task: self._settle(group, task))

    async def _ask(self, group: _Group) -> list[Grade]:
        async with self._place():
            if len(self._waiting) < self._size:
                self._is_full.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_SECONDS):
                        await self._is_full.wait()
            self._board(group)
            return await self._send([asked for asked, _ in group.members]) if group.members else []

    def _board(self, group: _Group) -> None:
        """Takes the first that wait, none of them twice; what is left looks for the next place."""
        ids: set[str] = set()
        left = []
        for asked, answer in self._waiting:
            if answer.done():
                continue
            if len(ids) < self._size and asked.id not in ids:
                ids.add(asked.id)
                group.members.append((asked, answer))
            else:
                left.append((asked, answer))
        self._waiting = left
        self._next = None
        if left:
            self._start()

    def _leave_alone(self) -> None:
        """Ends the calls that nobody waits for any more."""
        for group in self._groups:
            members = self._waiting if group is self._next else group.members
            if group.task is not None and all(answer.done() for _, answer in members):
                group.task.cancel()

    def _settle(self, group: _Group, task: "asyncio.Task[list[Grade]]") -> None:
        self._groups.remove(group)
        members = group.members
        if group is self._next:
            members, self._waiting, self._next = self._waiting, [], None
        error = None if task.cancelled() else task.exception()
        for position, (_, answer) in enumerate(members):
            if answer.done():
                continue
            if task.cancelled():
                answer.cancel()
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(task.result()[position])
