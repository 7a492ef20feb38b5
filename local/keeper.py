"""The keeper of `hone up`: parent of every process of the platform, in a session of its own.

`python -m local.keeper` is started by local/up.py with a pipe on standard input. The first line of the pipe holds the options;
after that `stop` asks for an orderly end and `now` for an immediate one. The end of the pipe means that `hone up` was killed.
"""

import http.client
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from core.settings import Settings
from local import processes
from local.home import CannotStart, Home
from local.machine import TRAINER_MODULES, list_gpus, missing_modules
from local.parts import LOOPBACK, Part, UpOptions, running_parts, setup_parts
from local.supervisor import Supervisor, describe_end, log_tail, spawn

START_SECONDS = 90.0


class Killed(Exception):
    """`hone up` is gone: end everything at once."""


class StopRequested(Exception):
    """The user wants an orderly end."""


def say(line: str) -> None:
    """One line for whoever reads; that nobody reads any more must not stop the platform."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Orders:
    """What `hone up` says through the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""
        self.is_urgent = False
        self.stop_asked = False

    def read_options(self) -> UpOptions:
        while b"\n" not in self._unread:
            self._receive()
        line, _, self._unread = self._unread.partition(b"\n")
        raw = json.loads(line)
        return UpOptions(home=Path(raw["home"]), host=raw["host"], port=raw["port"], workers=raw["workers"])

    def wait(self, seconds: float) -> None:
        """Waits at most so long. Raises: StopRequested once the user has asked, Killed at the pipe's end."""
        self.listen(seconds)
        if self.stop_asked:
            raise StopRequested

    def listen(self, seconds: float) -> None:
        """Takes in what has been said, waiting at most so long for it. Raises: Killed at the pipe's end."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return
        self._receive()
        *words, self._unread = self._unread.split(b"\n")
        self.stop_asked |= bool(words)
        self.is_urgent |= b"now" in words

    def asked_to_hurry(self) -> bool:
        self.listen(0)
        return self.is_urgent

    def _receive(self) -> None:
        block = os.read(self._descriptor, 4096)
        if not block:
            raise Killed
        self._unread += block


def run_once(part: Part, orders: Orders) -> None:
    """Raises: CannotStart with the end of the log when the process fails."""
    process = spawn(part)
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        orders.wait(0.05)
    if process.returncode != 0:
        how = "took too long" if process.returncode is None else describe_end(process)
        raise CannotStart(f"{part.name} {how}; the end of {part.log}:\n{log_tail(part)}")


def is_healthy(host: str, port: int) -> bool:
    """Whether GET /healthz answers 200."""
    connection = http.client.HTTPConnection(reachable(host), port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def reachable(host: str) -> str:
    """The address at which a server bound to `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(str(path)) == 0


def wait_until_ready(supervisor: Supervisor, orders: Orders, home: Home, is_ready: Callable[[], bool]) -> None:
    """Raises: CannotStart when a process dies first or the time is over."""
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        orders.wait(0.1)
        for entry in supervisor.ended():
            end = describe_end(entry.process)
            raise CannotStart(f"{entry.part.name} {end} while starting; the end of {entry.part.log}:\n{log_tail(entry.part)}")
        if time.monotonic() > deadline:
            raise CannotStart(f"The platform did not answer within {START_SECONDS:g} s; see {home.logs}.")


def announce(options: UpOptions, settings: Settings, home: Home) -> None:
    gpus = list_gpus()
    devices = f"{len(gpus)} GPU{'s' if len(gpus) != 1 else ''}" if gpus else "no GPU found, on the CPU"
    host = reachable(options.host)
    say(f"Hone {version('hone')} is up.")
    say(f"  API      http://{f'[{host}]' if ':' in host else host}:{options.port}/v1")
    say(f"  API key  {home.api_key}")
    say(f"  Logs     {home.logs}")
    say(f"  Workers  {options.workers} ({devices})")
    allowed = ",".join(settings.allowed_private_networks) or LOOPBACK
    say(f"  Graders may be reached on the private networks {allowed} (HONE_ALLOWED_PRIVATE_NETWORKS).")
    if missing_modules(TRAINER_MODULES):
        say('  Jobs cannot train yet: the trainer\'s packages are missing (pip install "hone[train]").')
    say("Stop with Ctrl-C.")


def run(options: UpOptions, orders: Orders, supervisor: Supervisor) -> None:
    """Starts everything and watches over it. Ends by StopRequested, Killed or CannotStart."""
    settings = Settings(home=options.home)
    home = Home(options.home)
    parts = running_parts(options, settings, home)
    for part in setup_parts(home, parts[0].environment):
        run_once(part, orders)
    if parts[0].name == "valkey":
        supervisor.start(parts.pop(0))
        wait_until_ready(supervisor, orders, home, lambda: accepts(settings.socket_path))
    for part in parts:
        supervisor.start(part)
    wait_until_ready(supervisor, orders, home, lambda: is_healthy(options.host, options.port))
    announce(options, settings, home)
    while True:
        supervisor.tick()
        orders.wait(0.5)


def stop(supervisor: Supervisor, orders: Orders) -> None:
    """Workers first, so that a running job's last words still reach the database; the broker last."""
    workers = [name for name in supervisor.running if name.startswith("worker")]
    say("Stopping. A running job writes its resume point first; Ctrl-C again ends everything at once.")
    for names in (workers, ["housekeeping"], ["api"], ["valkey"]):
        supervisor.stop(names, orders.asked_to_hurry)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    processes.adopt_orphans()
    orders = Orders(sys.stdin.fileno())
    signal.signal(signal.SIGTERM, lambda *_: setattr(orders, "stop_asked", True))
    supervisor = Supervisor(say)
    exit_code = 0
    try:
        run(orders.read_options(), orders, supervisor)
    except StopRequested:
        exit_code = stop_orderly(supervisor, orders)
    except CannotStart as error:
        say(f"hone up: {error.message}")
        exit_code = 1
    except Killed:
        exit_code = 1
    finally:
        processes.kill_descendants()
    return exit_code


def stop_orderly(supervisor: Supervisor, orders: Orders) -> int:
    try:
        stop(supervisor, orders)
    except Killed:
        return 1
    say("Stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
