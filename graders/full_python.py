"""All of Python in a sandbox of the kernel's: starts the sandbox's processes, hands a program over, and holds it to its time.

A program is sent only to a process that has said that every layer holds. What comes back is not trusted.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from core.errors import GraderError
from graders.sandbox_process import CONFINED, READY, REFUSED

ROOT = Path(__file__).parents[1]
START_SECONDS = 30.0
MAX_REPLY_BYTES = 64 * 1024
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop()); from graders.sandbox_process import main; main()"


class SandboxUnavailable(GraderError):
    """The sandbox cannot be set up on this host; the program was not run."""

    code = "python_grader_server_error"


class ProgramDied(GraderError):
    """The program ended its process without an answer, or its answer is none."""

    code = "python_grader_runtime_error"


class FullPython:
    """One program. Belongs to the event loop in which it is first used."""

    def __init__(self, source: str, memory_bytes: int, seconds: float) -> None:
        self._source = source
        self._memory_bytes = memory_bytes
        self._seconds = seconds
        self._idle: list[SandboxProcess] = []

    async def ask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What `sandbox_process` answers for {"sample", "item"}, or for {} what `grade` is. Each time in a child of its own.

        Raises: SandboxUnavailable, ProgramDied; TimeoutError when it takes longer than `seconds`.
        """
        process = self._idle.pop() if self._idle else await start_process(self._memory_bytes, self._seconds)
        try:
            reply = await process.ask({"source": self._source, **inputs}, self._seconds)
        except BaseException:
            process.close()
            raise
        self._idle.append(process)
        return reply

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class SandboxProcess:
    """One process that forks a confined child for each question. Belongs to the event loop in which it was started."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self._process = process
        self._control = control

    async def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises: SandboxUnavailable, ProgramDied, TimeoutError; close it then."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                ours.setblocking(False)
                try:
                    socket.send_fds(self._control, [b"g"], [theirs.fileno()])
                except OSError as error:
                    raise SandboxUnavailable(f"the sandbox process has ended: {error}") from error
            await _check_confined(ours)
            async with asyncio.timeout(seconds):
                reply = await _exchange(ours, json.dumps(question).encode())
                status = int.from_bytes(await _receive(self._control, 4), "little")
        return _parsed(reply, status)

    def close(self) -> None:
        """Kills it and its child."""
        self._control.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


async def start_process(memory_bytes: int, seconds: float) -> SandboxProcess:
    """Raises: SandboxUnavailable."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    arguments = [str(theirs.fileno()), str(memory_bytes), str(seconds), str(ROOT)]
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PYTHONHASHSEED": "0"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
    except OSError as error:
        ours.close()
        raise SandboxUnavailable(str(error)) from error
    started = SandboxProcess(process, ours)
    try:
        if await _soon(_receive(ours, 1)) != READY:
            raise SandboxUnavailable("the sandbox process ended before it was ready")
    except BaseException:
        started.close()
        raise
    return started


async def _check_confined(connection: socket.socket) -> None:
    """Raises: SandboxUnavailable with the layer that does not hold."""
    answer = await _soon(_receive(connection, 1))
    if answer == CONFINED:
        return
    why = await _soon(_receive(connection, MAX_REPLY_BYTES)) if answer == REFUSED else b"it died while it was set up"
    raise SandboxUnavailable(why.decode(errors="replace"))


async def _soon(receiving: Coroutine[Any, Any, bytes]) -> bytes:
    """What our own code answers before any program runs. Raises: SandboxUnavailable."""
    try:
        async with asyncio.timeout(START_SECONDS):
            return await receiving
    except TimeoutError as error:
        raise SandboxUnavailable(f"the sandbox process did not answer in {START_SECONDS:g} s") from error


async def _exchange(connection: socket.socket, question: bytes) -> bytes:
    """The answer to `question`. Raises: ProgramDied where it is too long."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(connection, question)
        connection.shutdown(socket.SHUT_WR)
    except ConnectionError:
        return b""
    reply = await _receive(connection, MAX_REPLY_BYTES + 1)
    if len(reply) > MAX_REPLY_BYTES:
        raise ProgramDied(f"The program wrote more than {MAX_REPLY_BYTES} bytes in place of a result.")
    return reply


async def _receive(connection: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer where the other side has closed."""
    loop = asyncio.get_running_loop()
    received = b""
    try:
        while len(received) < count and (part := await loop.sock_recv(connection, count - len(received))):
            received += part
    except ConnectionError:
        return received
    return received


def _parsed(reply: bytes, status: int) -> dict[str, Any]:
    """Raises: ProgramDied for what is no answer of ours."""
    if not reply:
        end = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        raise ProgramDied(f"The program ended its process without a result ({end}).")
    try:
        parsed = json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise ProgramDied("The program wrote something else in place of its result.") from error
    if not isinstance(parsed, dict):
        raise ProgramDied("The program wrote something else in place of its result.")
    return parsed
