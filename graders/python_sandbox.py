"""Runs a user's `grade(sample, item)` in a sandbox of its own process: no network, files or environment; bounded time and memory.

The interpreter is pydantic-monty, which has a subset of Python. A program that it cannot run is an error that says so:
nothing is ever executed in our own process instead.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic_monty import (
    AsyncMonty,
    AsyncMontySession,
    MontyConversionError,
    MontyCrashedError,
    MontyError,
    MontyRuntimeError,
    MontySyntaxError,
    OSPolicy,
    ResourceLimits,
)

from core.errors import InvalidGrade, InvalidRequest
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.reply import finite_number

MAX_SECONDS = 120.0
PLAIN_TYPES = frozenset({"NoneType", "bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple"})
"""What `grade` is when it is surely no function; the sandbox has no `callable`."""


@dataclass(frozen=True)
class SandboxLimits:
    """Of one grade."""

    seconds: float = 10.0
    """For the program's top level and again for the call of `grade`; at most MAX_SECONDS."""

    memory_bytes: int = 256 * 1024 * 1024
    num_processes: int = 2
    """Grades that run at the same time."""

    def as_resource_limits(self) -> ResourceLimits:
        return ResourceLimits(
            max_feed_duration_secs=min(self.seconds, MAX_SECONDS),
            max_memory=self.memory_bytes,
            max_recursion_depth=500,
            max_suspensions=100,
            max_total_sleep_secs=0.0,
        )


class PythonGrader:
    """Belongs to the event loop in which it is first used. Starts its processes at the first grade."""

    def __init__(self, source: str, limits: SandboxLimits | None = None, *, binary_path: Path | None = None) -> None:
        self._source = source
        self._limits = limits or SandboxLimits()
        self._binary_path = binary_path
        self._places = asyncio.Semaphore(self._limits.num_processes)
        self._starting = asyncio.Lock()
        self._pool: AsyncMonty | None = None

    async def grade(self, request: GradeRequest) -> Grade:
        async with self._places:
            started = time.monotonic()
            attempts = 1
            grade = await self._run(request)
            if grade.error == GradeFailure.PYTHON_SERVER:
                attempts = 2
                grade = await self._run(request)
            return replace(grade, attempts=attempts, latency_seconds=time.monotonic() - started)

    async def check(self, param: str = "source") -> None:
        """Loads the program without grading. Raises: InvalidRequest when it does not load or defines no `grade`."""
        kind = await self._attempt("type(grade).__name__", {})
        if isinstance(kind, Grade):
            raise InvalidRequest(f"'{param}': {kind.error_message}", code=kind.error, param=param)
        if kind in PLAIN_TYPES:
            message = f"'{param}': 'grade' must be a function grade(sample, item), not {kind}."
            raise InvalidRequest(message, code=GradeFailure.PYTHON_RUNTIME.value, param=param)

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.__aexit__(None, None, None)

    async def _run(self, request: GradeRequest) -> Grade:
        result = await self._attempt("grade(_sample, _item)", {"_sample": request.sample, "_item": request.item})
        if isinstance(result, Grade):
            return result
        try:
            return Grade(finite_number(result, "grade(sample, item)"))
        except InvalidGrade as error:
            return failed(GradeFailure.INVALID_SCORE, error.message)

    async def _attempt(self, expression: str, inputs: dict[str, Any]) -> Any:
        """The value of `expression` after the program, or the Grade of its failure. A fresh session: nothing stays behind."""
        policy = OSPolicy(sleep="zero", random_start={"seed": 0})
        try:
            pool = await self._started_pool()
            async with pool.checkout(limits=self._limits.as_resource_limits(), os_policy=policy) as session:
                await _feed(session, self._source, {})
                return await _feed(session, expression, inputs)
        except MontyError as error:
            return _failure(error)
        except (RuntimeError, OSError) as error:
            return failed(GradeFailure.PYTHON_SERVER, f"The sandbox cannot run on this host, so the program was not run: {error}")

    async def _started_pool(self) -> AsyncMonty:
        async with self._starting:
            if self._pool is None:
                pool = AsyncMonty(
                    binary_path=self._binary_path,
                    max_processes=self._limits.num_processes,
                    request_timeout=min(self._limits.seconds, MAX_SECONDS) + 5.0,
                )
                await pool.__aenter__()
                self._pool = pool
            return self._pool


async def _feed(session: AsyncMontySession, code: str, inputs: dict[str, Any]) -> Any:
    return await session.feed_run(code, inputs=inputs, print_callback=_discard)


def _discard(stream: str, text: str) -> None:
    """What the program prints is not kept."""


def _failure(error: MontyError) -> Grade:
    """The failure's own code; the text is the program's traceback, which the program's owner may read."""
    if isinstance(error, MontyCrashedError):
        if error.timed_out:
            return failed(GradeFailure.PYTHON_TIMEOUT, "The program did not end in time and was killed.")
        return failed(GradeFailure.PYTHON_SERVER, "The sandbox process died while it ran the program.")
    if isinstance(error, MontyConversionError):
        return failed(GradeFailure.REQUEST_INVALID, f"The row cannot be passed to the program: {error}")
    text = error.display() if isinstance(error, MontyRuntimeError | MontySyntaxError) else str(error)
    inner = error.exception()
    message = str(inner)
    if isinstance(inner, TimeoutError) and "time limit exceeded" in message:
        return failed(GradeFailure.PYTHON_TIMEOUT, text)
    if isinstance(inner, MemoryError):
        return failed(GradeFailure.PYTHON_MEMORY, text)
    if isinstance(inner, ModuleNotFoundError) or (isinstance(inner, NotImplementedError) and "monty" in message):
        return failed(GradeFailure.PYTHON_UNSUPPORTED, f"The sandbox does not have what the program uses. {text}")
    if isinstance(inner, NameError) and "'grade'" in message:
        return failed(GradeFailure.PYTHON_RUNTIME, f"The program must define grade(sample, item). {text}")
    return failed(GradeFailure.PYTHON_RUNTIME, text)
