"""The platform as real processes: API, workers and housekeeping on a home of their own, ended with the context.

with run_platform(home, broker_url=url, database_url=url, environment={...}) as platform:
    platform.client() ...   # the unmodified openai client with the admin key
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from core.settings import Settings
from database.projects import ensure_first_admin
from database.secrets import ensure_secret_key
from database.session import open_database
from local.processes import dying_with_parent
from migrations.run import upgrade
from tests.servers import free_port

START_SECONDS = 60.0
STOP_SECONDS = 30.0
QUICK = {
    "HONE_LEASE_SECONDS": "20",
    "HONE_SWEEP_SECONDS": "1",
    "HONE_NUM_THREADS": "1",
    "HONE_ALLOWED_PRIVATE_NETWORKS": "127.0.0.0/8,::1/128",
}


@dataclass
class Running:
    process: "subprocess.Popen[bytes]"
    log: Path


@dataclass
class Platform:
    home: Path
    url: str
    key: str
    environment: dict[str, str]
    settings: Settings
    processes: dict[str, Running] = field(default_factory=dict)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=1, timeout=30)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """What the API answers; an error is an AssertionError with its body."""
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers, method=method), timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read().decode()}") from error

    def start(self, name: str, command: Sequence[str], **environment: str) -> Running:
        """A process that ends with us; its output lies in `home`/logs."""
        log = self.home / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
                preexec_fn=dying_with_parent(),
            )
        self.processes[name] = Running(process, log)
        return self.processes[name]

    def start_worker(self, name: str = "worker") -> Running:
        options = ["-P", "threads", "-c", "1", "-Q", "jobs", "-n", f"{name}@%h", "--without-gossip", "--without-mingle"]
        return self.start(name, ["-m", "celery", "-A", "worker.celery_app", "worker", *options], HONE_WORKER_NAME=name)

    def kill(self, name: str) -> None:
        """SIGKILL: no last words."""
        running = self.processes.pop(name)
        running.process.kill()
        running.process.wait()

    def wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Until `condition` holds; fails with every log's end when it takes longer or a process ends by itself."""
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, running in self.processes.items() if running.process.poll() is not None]
            assert not dead, f"{dead} ended while waiting for {what}\n{self.logs()}"
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s\n{self.logs()}"
            time.sleep(0.1)

    def wait_for_end(self, job_id: str, seconds: float = 120.0) -> Any:
        """The job once it has ended, as the openai client sees it."""
        client = self.client()
        ended = ("succeeded", "failed", "cancelled")
        self.wait(f"end of {job_id}", lambda: client.fine_tuning.jobs.retrieve(job_id).status in ended, seconds)
        return client.fine_tuning.jobs.retrieve(job_id)

    def logs(self, characters: int = 3000) -> str:
        files = [*sorted((self.home / "logs").glob("*.log")), *sorted((self.home / "runs").glob("*/*/trainer.log"))]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-characters:]}" for path in files)

    def stop(self) -> None:
        """Workers first, as `hone up` does it."""
        order = sorted(self.processes, key=lambda name: not name.startswith("worker"))
        for name in order:
            self.processes[name].process.send_signal(signal.SIGTERM)
        for name in order:
            process = self.processes.pop(name).process
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def run_platform(
    home: Path, *, broker_url: str, database_url: str = "", workers: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Platform]:
    """Everything up and answering. The database is migrated here and must have no project yet."""
    platform = _prepare(home, broker_url, database_url, dict(environment or {}))
    port = platform.url.rpartition(":")[2]
    try:
        platform.start("api", ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", port, "--timeout-graceful-shutdown", "2"])
        options = ["-P", "threads", "-c", "3", "-Q", "housekeeping", "-B", "-s", str(home / "beat"), "-n", "housekeeping@%h"]
        quiet = ["--without-gossip", "--without-mingle"]
        platform.start("housekeeping", ["-m", "celery", "-A", "housekeeping.celery_app", "worker", *options, *quiet])
        for number in range(workers):
            platform.start_worker(f"worker{number + 1}")
        platform.wait("API", lambda: _is_healthy(platform.url), START_SECONDS)
        yield platform
    finally:
        platform.stop()


def _prepare(home: Path, broker_url: str, database_url: str, more: dict[str, str]) -> Platform:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = Settings(home=home, database_url=database_url)
    upgrade(settings)
    ensure_secret_key(settings)
    database = open_database(settings)
    with database.transaction() as session:
        key = ensure_first_admin(session)
    database.close()
    assert key is not None, "the database has a project already"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    own = {"HONE_HOME": str(home), "HONE_BROKER_URL": broker_url, "PYTHONUNBUFFERED": "1"}
    own |= {"HONE_DATABASE_URL": database_url} if database_url else {}
    return Platform(home, f"http://127.0.0.1:{free_port()}", key, {**inherited, **own, **QUICK, **more}, settings)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
