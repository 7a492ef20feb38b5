"""Runs a user's `grade(sample, item)` in a sandbox of its own process: no network, files or environment; bounded time and memory.

First in pydantic-monty, an interpreter of a subset of Python; a program that needs more in all of Python, confined by the kernel.
Where neither can run it the grade has failed: nothing is ever executed in our own process, or unconfined, instead.
"""

import asyncio
import builtins
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from graders.full_python import FullPython, ProgramDied, SandboxUnavailable
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.reply import finite_number

MAX_SECONDS = 120.0
PLAIN_TYPES = frozenset({"NoneType", "bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple"})
"""What `grade` is when it is surely no function; the subset has no `callable`."""
NO_SANDBOX = "The sandbox cannot run on this host, so the program was not run"


@dataclass(frozen=True)
class SandboxLimits:
    """Of one grade."""

    seconds: float = 10.0
    """At most MAX_SECONDS. In the subset for the program's top level and again for the call of `grade`, else for both together."""

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

    def __init__(
        self,
        source: str,
        limits: SandboxLimits | None = None,
        *,
        interpreter: Literal["auto", "cpython"] = "auto",
        binary_path: Path | None = None,
    ) -> None:
        self._source = source
        self._limits = limits or SandboxLimits()
        self._binary_path = binary_path
        self._places = asyncio.Semaphore(self._limits.num_processes)
        self._starting = asyncio.Lock()
        self._pool: AsyncMonty | None = None
        self._full = FullPython(source, self._limits.memory_bytes, min(self._limits.seconds, MAX_SECONDS))
        self._needs_all = interpreter == "cpython"
        """Whether the program is known to be more than the subset can load."""

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
        kind = await self._attempt(None)
        if isinstance(kind, Grade):
            raise InvalidRequest(f"'{param}': {kind.error_message}", code=kind.error, param=param)
        if kind in PLAIN_TYPES:
            message = f"'{param}': 'grade' must be a function grade(sample, item), not {kind}."
            raise InvalidRequest(message, code=GradeFailure.PYTHON_RUNTIME.value, param=param)

    async def close(self) -> None:
        self._full.close()
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.__aexit__(None, None, None)

    async def _run(self, request: GradeRequest) -> Grade:
        result = await self._attempt(request)
        if isinstance(result, Grade):
            return result
        try:
            return Grade(finite_number(result, "grade(sample, item)"))
        except InvalidGrade as error:
            return failed(GradeFailure.INVALID_SCORE, error.message)

    async def _attempt(self, request: GradeRequest | None) -> Any:
        """What `grade` returns for `request`, without one the name of its type; or the Grade of the failure."""
        if self._needs_all:
            return await self._attempt_in_all(request)
        result = await self._attempt_in_subset(request)
        if not isinstance(result, Grade) or result.error != GradeFailure.PYTHON_UNSUPPORTED:
            return result
        again = await self._attempt_in_all(request)
        if isinstance(again, Grade) and again.error == GradeFailure.PYTHON_SERVER:
            return failed(GradeFailure.PYTHON_UNSUPPORTED, f"{result.error_message}\n{again.error_message}")
        return again

    async def _attempt_in_subset(self, request: GradeRequest | None) -> Any:
        """A fresh session: nothing stays behind."""
        expression = "type(grade).__name__" if request is None else "grade(_sample, _item)"
        inputs = {} if request is None else {"_sample": request.sample, "_item": request.item}
        policy = OSPolicy(sleep="zero", random_start={"seed": 0})
        is_loaded = False
        try:
            pool = await self._started_pool()
            async with pool.checkout(limits=self._limits.as_resource_limits(), os_policy=policy) as session:
                await _feed(session, self._source, {})
                is_loaded = True
                return await _feed(session, expression, inputs)
        except MontyError as error:
            grade = _failure(error)
            self._needs_all = not is_loaded and grade.error == GradeFailure.PYTHON_UNSUPPORTED
            return grade
        except (RuntimeError, OSError) as error:
            return failed(GradeFailure.PYTHON_SERVER, f"{NO_SANDBOX}: {error}")

    async def _attempt_in_all(self, request: GradeRequest | None) -> Any:
        try:
            reply = await self._full.ask({} if request is None else {"sample": request.sample, "item": request.item})
        except SandboxUnavailable as error:
            return failed(GradeFailure.PYTHON_SERVER, f"{NO_SANDBOX}: {error.message}")
        except ProgramDied as error:
            return failed(GradeFailure.PYTHON_RUNTIME, error.message)
        except TimeoutError:
            return failed(GradeFailure.PYTHON_TIMEOUT, "The program did not end in time and was killed.")
        return _load_result(reply) if request is None else _call_result(reply)

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


def _load_result(reply: dict[str, Any]) -> Any:
    """The name of `grade`'s type, a plain one for whatever cannot be called; or the Grade of the failure."""
    if "error" in reply:
        return _reported(reply)
    return str(reply.get("type")) if reply.get("callable") is True else "NoneType"


def _call_result(reply: dict[str, Any]) -> Any:
    """The number, or the Grade of the failure. The process that wrote `reply` was the program's: none of it is trusted."""
    if "error" in reply:
        return _reported(reply)
    if "type" in reply:
        return failed(GradeFailure.INVALID_SCORE, f"'grade(sample, item)' must be a number, not {str(reply['type'])[:100]}.")
    return reply.get("value")


def _reported(reply: dict[str, Any]) -> Grade:
    if reply["error"] == "memory":
        return failed(GradeFailure.PYTHON_MEMORY, "The program took too much memory.")
    is_unsupported = reply["error"] == "unsupported"
    return failed(GradeFailure.PYTHON_UNSUPPORTED if is_unsupported else GradeFailure.PYTHON_RUNTIME, str(reply.get("text")))


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
    if isinstance(inner, NameError) and any(f"'{name}'" in message for name in vars(builtins)):
        return failed(GradeFailure.PYTHON_UNSUPPORTED, text)
    if isinstance(inner, NameError) and "'grade'" in message:
        return failed(GradeFailure.PYTHON_RUNTIME, f"The program must define grade(sample, item). {text}")
    return failed(GradeFailure.PYTHON_RUNTIME, text)
