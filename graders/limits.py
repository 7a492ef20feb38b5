"""How many calls to a service may be open and how fast they begin; here by what this process alone knows."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from core.errors import GraderError
from core.grader_specs import CallOptions


class LimitsUnavailable(GraderError):
    """Nobody could say whether a call may begin."""

    code = "grader_limits_unavailable"
    retryable = True


class Limiter(Protocol):
    """Of one service. Belongs to the event loop in which it is first used."""

    def place(self) -> AbstractAsyncContextManager[None]:
        """Waits for a place and for its turn to begin; held until left. Raises: LimitsUnavailable."""
        ...

    async def pace(self) -> None:
        """Waits until a holder may begin one more call. Raises: LimitsUnavailable."""
        ...

    async def close(self) -> None: ...


MakeLimiter = Callable[[str, CallOptions], Limiter]
"""The limiter of the service at a URL."""


class LocalLimiter:
    """Knows only this process."""

    def __init__(self, options: CallOptions) -> None:
        self._places = asyncio.Semaphore(options.max_concurrency)
        self._interval = 1.0 / options.rate_limit if options.rate_limit else 0.0
        self._next_start = 0.0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        async with self._places:
            await self.pace()
            yield

    async def pace(self) -> None:
        if not self._interval:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        self._next_start = start + self._interval
        await asyncio.sleep(start - now)

    async def close(self) -> None:
        pass


def local_limiter(url: str, options: CallOptions) -> Limiter:
    return LocalLimiter(options)
