"""The folder of an installation on one machine: made, locked, and told apart from one that is in use."""

import fcntl
import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from core.errors import PlatformError
from local import processes

MAX_SOCKET_PATH = 107
"""sun_path of Linux holds 108 bytes with its closing zero."""
MAX_LOG_BYTES = 20 * 1024 * 1024


class CannotStart(PlatformError):
    """`hone up` cannot run here; the message says what to do."""

    code = "cannot_start"


@dataclass(frozen=True)
class Home:
    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def api_key(self) -> Path:
        return self.path / "api_key"

    @property
    def lock(self) -> Path:
        return self.run / "up.lock"

    @property
    def facts(self) -> Path:
        """Who runs here: {"pid", "start_ticks", "url"}."""
        return self.run / "up.json"


def prepare_home(path: Path, socket_path: Path) -> Home:
    """The home with its folders. Raises: CannotStart."""
    home = Home(path)
    if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH:
        raise CannotStart(f"The path {socket_path} is too long for a unix socket ({MAX_SOCKET_PATH} bytes): choose a shorter --home.")
    try:
        home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (home.run, home.logs):
            folder.mkdir(mode=0o700, exist_ok=True)
        home.run.chmod(0o700)
    except OSError as error:
        raise CannotStart(f"Cannot use {path} as home: {error.strerror}.") from error
    return home


def lock_home(home: Home, patience_seconds: float = 12.0) -> int:
    """A file descriptor that holds the home's lock for as long as anyone has it open.

    A killed `hone up` leaves its lock for the moment that its keeper needs to end everything: that moment is waited for.
    Raises: CannotStart when another `hone up` is alive.
    """
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            pid, is_running, url = _occupant(home)
            if is_running or time.monotonic() > deadline:
                os.close(descriptor)
                raise CannotStart(
                    f"Another 'hone up' (pid {pid}) already uses {home.path} and answers at {url}. Stop it, or choose another --home."
                ) from None
        time.sleep(0.1)


def _occupant(home: Home) -> tuple[int, bool, str]:
    """(pid, whether that very process lives, url) of who last started here."""
    try:
        facts = json.loads(home.facts.read_text())
        pid, start_ticks, url = int(facts["pid"]), int(facts["start_ticks"]), str(facts["url"])
    except (OSError, ValueError, KeyError):
        return 0, False, "an unknown address"
    return pid, processes.is_alive(pid, start_ticks), url


def write_facts(home: Home, url: str) -> None:
    own = processes.read_process(os.getpid())
    facts = {"pid": os.getpid(), "start_ticks": own.start_ticks if own else 0, "url": url}
    temporary = home.facts.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts))
    temporary.replace(home.facts)


def read_url(home: Home) -> str | None:
    """Where the platform of this home answers, if it runs."""
    _, is_running, url = _occupant(home)
    return url if is_running else None


def clear_leftovers(home: Home) -> int:
    """Ends what an earlier run left behind; call with the lock held. Returns the number of processes ended."""
    left = processes.marked(str(home.path))
    for process in left:
        processes.kill(process.pid, signal.SIGKILL)
    for stale in (home.run / "valkey.sock", *home.run.glob("beat*")):
        stale.unlink(missing_ok=True)
    for log in home.logs.glob("*.log"):
        if log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
    return len(left)


def find_port(host: str, port: int) -> int:
    """`port` if it can be bound, a free one for 0. Raises: CannotStart naming the port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise CannotStart(f"Unknown host '{host}': {error.strerror}.") from error
    except OSError as error:
        raise CannotStart(f"Port {port} on {host} cannot be used ({error.strerror}): free it, or choose another with --port.") from error
