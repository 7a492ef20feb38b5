"""Limits that hold over the whole platform, through Redis.

A place is leased: its holder renews it, and one that died loses it. While the broker is away holders go on and nobody gets a new place.
After the broker's start nobody gets one until every holder has told of its own.
Not covered: a broker that is emptied without a restart, and a holder that alone is cut off from it for longer than its lease.
"""

import asyncio
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.errors import GraderError
from core.grader_specs import CallOptions
from graders.limits import LimitsUnavailable
from graders.limits_script import SCRIPT

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
RETRY_SECONDS = 0.2
SOCKET_SECONDS = 2.0
LOOK_AHEAD_SECONDS = 0.05
"""How far ahead the start of a call is fixed: calls keep their distance although processes ask only now and then."""


@dataclass(frozen=True)
class SharedLimits:
    """Makes limiters that all processes with the same broker and `scope` share, one for each URL."""

    broker_url: str = field(repr=False)
    """As Celery takes it; Redis or Valkey."""

    scope: str
    """Whose calls count together: a project."""

    owner: str
    """Who takes turns with the others: a job."""

    away_seconds: float = 60.0
    """A call that has waited so long for a broker that is away fails."""

    renew_seconds: float = 2.0
    lease_seconds: float = 15.0
    settle_seconds: float = 5.0
    """From the broker's start to the first new place: longer than every holder needs to notice and renew."""

    def __call__(self, url: str, options: CallOptions) -> "SharedLimiter":
        digest = hashlib.sha256(url.encode()).hexdigest()[:32]
        return SharedLimiter(self, f"hone:limits:{self.scope}:{digest}", options)


@dataclass(frozen=True)
class _Waiter:
    answer: "asyncio.Future[float]"
    """When it may begin, by the loop's clock."""

    since: float


class SharedLimiter:
    """Tells the broker, as often as something changes, how many places it holds and wants; what it tells replaces what it told before."""

    def __init__(self, limits: SharedLimits, key: str, options: CallOptions) -> None:
        self._limits = limits
        self._keys = [key, f"{key}:state"]
        self._options = options
        self._instance = secrets.token_hex(8)
        self._sequence = 0
        self._held = 0
        self._waiting: deque[_Waiter] = deque()
        """For a place."""
        self._pacing: deque[_Waiter] = deque()
        """For one more start within a place."""
        self._changed = asyncio.Event()
        self._is_closing = False
        self._away_since: float | None = None
        self._client = _client(limits.broker_url)
        self._script = self._client.register_script(SCRIPT)
        self._talk: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        waiter = self._wait_in(self._waiting)
        try:
            await _begin(waiter)
            yield
        finally:
            if _is_granted(waiter):
                self._held -= 1
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
            self._changed.set()

    async def pace(self) -> None:
        if self._options.rate_limit is None:
            return
        waiter = self._wait_in(self._pacing)
        try:
            await _begin(waiter)
        finally:
            if waiter in self._pacing:
                self._pacing.remove(waiter)

    async def close(self) -> None:
        """Gives back what is still held."""
        self._is_closing = True
        self._changed.set()
        if self._talk is not None:
            await asyncio.wait({self._talk})
            with suppress(RedisError, OSError):
                await self._tell(leaves=True)
        await self._client.aclose()

    def _wait_in(self, queue: deque[_Waiter]) -> _Waiter:
        loop = asyncio.get_running_loop()
        if self._talk is None:
            self._talk = loop.create_task(self._keep_telling())
        waiter = _Waiter(loop.create_future(), loop.time())
        queue.append(waiter)
        self._changed.set()
        return waiter

    async def _keep_telling(self) -> None:
        while not self._is_closing:
            self._changed.clear()
            is_told = await self._try_to_tell()
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # Python 3.11's wait_for, which the client uses, may swallow a cancellation
            if not is_told:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            pause = POLL_SECONDS if self._waiting or self._pacing else self._limits.renew_seconds if self._held else None
            with suppress(TimeoutError):
                async with asyncio.timeout(0 if self._is_closing else pause):
                    await self._changed.wait()

    async def _try_to_tell(self) -> bool:
        try:
            await self._tell()
        except (RedisError, OSError) as error:
            self._refuse_long_waits(error)
            return False
        self._away_since = None
        return True

    async def _tell(self, leaves: bool = False) -> None:
        """One exchange with the broker; hands out what it grants."""
        self._sequence += 1
        limits, options = self._limits, self._options
        told: list[Any] = [self._instance, limits.owner, self._sequence, self._held, len(self._waiting), len(self._pacing), int(leaves)]
        bounds = [options.max_concurrency, options.rate_limit or 0, LOOK_AHEAD_SECONDS, limits.lease_seconds, limits.settle_seconds]
        places, starts = await self._script(keys=self._keys, args=[*told, *bounds])
        now = asyncio.get_running_loop().time()
        self._held += _answer(self._waiting, [now + float(delay) for delay in places])
        _answer(self._pacing, [now + float(delay) for delay in starts])

    def _refuse_long_waits(self, error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if self._away_since is None:
            self._away_since = now
            logger.warning("The broker is away, no new call to a grader begins: %s", type(error).__name__)
        for queue in (self._waiting, self._pacing):
            while queue and now - max(queue[0].since, self._away_since) > self._limits.away_seconds:
                message = f"The broker, which holds the limits of all calls, has not answered for {self._limits.away_seconds:g} seconds."
                waiter = queue.popleft()
                if not waiter.answer.done():
                    waiter.answer.set_exception(LimitsUnavailable(message))


def _answer(queue: deque[_Waiter], starts: list[float]) -> int:
    """Gives `starts` to the first that still wait; -> how many took one."""
    takers = [waiter for waiter in queue if not waiter.answer.done()][: len(starts)]
    for waiter, start in zip(takers, starts, strict=False):
        queue.remove(waiter)
        waiter.answer.set_result(start)
    return len(takers)


async def _begin(waiter: _Waiter) -> None:
    start_at = await waiter.answer
    await asyncio.sleep(start_at - asyncio.get_running_loop().time())


def _is_granted(waiter: _Waiter) -> bool:
    return waiter.answer.done() and not waiter.answer.cancelled() and waiter.answer.exception() is None


def _client(broker_url: str) -> "redis.Redis":
    """Raises: GraderError for a broker that is neither Redis nor Valkey; it does not quote the URL, which may hold a password."""
    if broker_url.startswith("redis+socket://"):
        path, _, options = broker_url.removeprefix("redis+socket://").partition("?")
        database = dict(option.partition("=")[::2] for option in options.split("&")).get("virtual_host", "0")
        broker_url = f"unix://{path}?db={database}"
    elif not broker_url.startswith(("redis://", "rediss://")):
        raise GraderError("Limits that hold over the platform need Redis or Valkey as broker.", code="grader_limits_unavailable")
    return redis.Redis.from_url(
        broker_url,
        socket_timeout=SOCKET_SECONDS,
        socket_connect_timeout=SOCKET_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )
