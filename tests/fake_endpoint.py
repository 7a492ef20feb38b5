"""A real HTTP server that misbehaves as told, for graders and everything that calls one. Runs on a thread and a free loopback port.

with FakeEndpoint([status(503), score(0.5)]) as endpoint:   # the last reply repeats
    ... endpoint.url ... endpoint.requests
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

LOOPBACK = ("127.0.0.0/8",)


@dataclass(frozen=True)
class Received:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""

    body: bytes
    at: float
    """time.monotonic()."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before the first byte."""

    is_held: Callable[[], bool] = bool
    """Nothing is sent while it says so; never, as it stands."""

    drip: float = 0.0
    """Seconds between single bytes of the body."""

    cut_after: int | None = None
    """Closes the connection after so many bytes of the body, although the length promised more."""

    reset: bool = False
    """Closes without an answer, with a TCP reset."""

    raw: bytes | None = None
    """Sent instead of everything above."""

    endless: bool = False
    """Repeats the body for ever, without a length."""


def answer(value: Any, **more: Any) -> Reply:
    """`value` as JSON; NaN and Infinity are written as Python writes them."""
    return Reply(json.dumps(value).encode(), **more)


def score(value: Any, **more: Any) -> Reply:
    return answer({"score": value}, **more)


def status(code: int, body: bytes = b"no", **headers: str) -> Reply:
    return Reply(body, status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})


def hang() -> Reply:
    return Reply(delay=3600.0)


def silent_after_headers() -> Reply:
    """Promises a body that never comes."""
    return Reply(headers={"content-length": "20"})


def dripping(seconds_per_byte: float) -> Reply:
    return score(0.5, drip=seconds_per_byte)


Plan = Sequence[Reply] | Callable[[Received], Reply]


class FakeEndpoint:
    def __init__(self, plan: Plan, *, port: int = 0, ssl_context: Any = None) -> None:
        self._plan = plan
        self._port = port
        self._ssl_context = ssl_context
        self._lock = threading.Lock()
        self._ready: Future[int] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.requests: list[Received] = []
        self.num_open = 0
        self.most_open = 0
        """Most requests that were being answered at the same time."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._port = self._ready.result(timeout=10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=10)

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        return f"{'https' if self._ssl_context else 'http'}://localhost:{self._port}/grade"

    def wait_for_requests(self, number: int, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.requests) < number:
            assert time.monotonic() < deadline, f"{len(self.requests)} of {number} requests came"
            time.sleep(0.005)

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Until every caller has gone away or was answered."""
        deadline = time.monotonic() + seconds
        while self.num_open:
            assert time.monotonic() < deadline, f"{self.num_open} requests are still open"
            time.sleep(0.005)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._converse, "127.0.0.1", self._port, ssl=self._ssl_context)
        self._ready.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (received := await _read_request(reader)) is not None:
                with self._lock:
                    reply = self._next_reply(received)
                    self.requests.append(received)
                    self.num_open += 1
                    self.most_open = max(self.most_open, self.num_open)
                try:
                    keep = await _until_gone(reader, _write_reply(writer, reply))
                finally:
                    with self._lock:
                        self.num_open -= 1
                if not keep:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _next_reply(self, received: Received) -> Reply:
        if callable(self._plan):
            return self._plan(received)
        return self._plan[min(len(self.requests), len(self._plan) - 1)]


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, path, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, path, headers, body, time.monotonic())


async def _until_gone(reader: asyncio.StreamReader, writing: Coroutine[Any, Any, bool]) -> bool:
    """The result of `writing`, given up as soon as the caller closes its side."""
    task = asyncio.ensure_future(writing)
    try:
        while not task.done() and not reader.at_eof() and reader.exception() is None:
            await asyncio.wait({task}, timeout=0.01)
        return task.done() and task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _write_reply(writer: asyncio.StreamWriter, reply: Reply) -> bool:
    """True when the connection may be used again."""
    await asyncio.sleep(reply.delay)
    while reply.is_held():
        await asyncio.sleep(0.01)
    if reply.reset:
        writer.transport.abort()
        return False
    if reply.raw is not None:
        writer.write(reply.raw)
        await writer.drain()
        return False
    headers = {"content-type": "application/json", **reply.headers}
    if not reply.endless:
        headers.setdefault("content-length", str(len(reply.body)))
    lines = [f"HTTP/1.1 {reply.status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    await writer.drain()
    while reply.endless:
        writer.write(reply.body)
        await writer.drain()
    for chunk in [bytes([byte]) for byte in reply.body] if reply.drip else [reply.body[: reply.cut_after]]:
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(reply.drip)
    return reply.cut_after is None
