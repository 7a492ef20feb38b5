"""`hone up` as a user meets it: these tests start the whole platform, because what must hold is that nothing of it stays."""

import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.client import Client
from local.home import Home, read_url
from tests.local.trees import alive_with, tree_of, wait_for
from tests.tiny import build_tiny_model

START_SECONDS = 60.0
PARTS = ("valkey-server", "uvicorn", "housekeeping.celery_app", "worker.celery_app", "local.keeper")


class Up:
    """One `hone up` with its output in a file."""

    def __init__(self, home: Path, log: Path, *options: str) -> None:
        self.home, self.log = Home(home), log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
        command = [sys.executable, "-m", "local.cli", "up", "--home", str(home), *options]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)

    def wait_until_up(self) -> str:
        assert wait_for(lambda: "is up." in self.log.read_text() or self.process.poll() is not None, START_SECONDS), self.log.read_text()
        assert self.process.poll() is None, self.log.read_text()
        url = read_url(self.home)
        assert url is not None
        return url

    def everything(self) -> set[int]:
        return {self.process.pid} | tree_of(self.process.pid)

    def is_gone(self, pids: set[int]) -> bool:
        return not [pid for pid in pids if Path(f"/proc/{pid}").exists()] and alive_with(f"HONE_UP={self.home.path}") == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("up")


@pytest.fixture
def up(folder: Path) -> Iterator[Up]:
    running = Up(folder / "home", folder / "first.log", "--port", "0", "--workers", "1")
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.wait()
    assert wait_for(lambda: alive_with(f"HONE_UP={running.home.path}") == [], 10)


def get(url: str, key: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def refused(home: Path, log: Path, *options: str) -> str:
    """What a `hone up` that must not start says."""
    other = Up(home, log, *options)
    assert other.process.wait(timeout=20) == 1
    return log.read_text()


def connect(up: Up, url: str) -> Client:
    return Client(f"{url}/v1", up.home.api_key.read_text().strip())


def submit_long_job(client: Client, folder: Path) -> str:
    """A job that would train a tiny model for far longer than this test takes."""
    client.models.add("tiny", {"type": "folder", "path": str(build_tiny_model(folder / "tiny"))})
    row = b'{"messages": [{"role": "user", "content": "a or b?"}]}\n'
    file = client.files.upload_bytes(row * 12, "rows.jsonl")
    options = {"finetuning": "full", "precision": "float32", "batch_size": 2, "group_size": 2, "max_completion_tokens": 4}
    grader = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "a", "operation": "like"}
    block = {"grader": grader, "hyperparameters": {**options, "max_steps": 50_000, "eval_interval": 50_000}}
    method = {"type": "reinforcement", "reinforcement": block}
    return str(client.jobs.create({"model": "tiny", "training_file": file["id"], "method": method})["id"])


def trains(client: Client, job_id: str, *, attempt: int, beyond: int) -> bool:
    job = client.jobs.retrieve(job_id)
    assert job["status"] in ("validating_files", "queued", "running"), job
    return job["attempt"] == attempt and (job["current_step"] or 0) > beyond


def read_rows(home: Home, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(f"file:{home.path / 'hone.db'}?mode=ro", uri=True) as database:
        return database.execute(query).fetchall()


def test_platform_answers_is_alone_on_its_home_and_stops_at_ctrl_c(up: Up, folder: Path) -> None:
    url = up.wait_until_up()
    assert get(f"{url}/healthz") == 200
    assert stat.S_IMODE(up.home.api_key.stat().st_mode) == 0o600
    assert get(f"{url}/v1/models", up.home.api_key.read_text().strip()) == 200
    assert get(f"{url}/v1/models") == 401
    for part in PARTS:
        assert [pid for pid in alive_with(part) if pid in up.everything()], f"{part} does not run below hone up"
    assert "127.0.0.0/8" in up.log.read_text()

    with socket.socket(socket.AF_UNIX) as broker:
        broker.settimeout(5)
        broker.connect(str(up.home.run / "valkey.sock"))
        broker.sendall(b"CONFIG GET port\r\n")
        assert broker.recv(4096).split() == [b"*2", b"$4", b"port", b"$1", b"0"]

    said = refused(up.home.path, folder / "second.log", "--port", "0")
    assert f"pid {up.process.pid}" in said
    assert url in said
    port = url.rpartition(":")[2]
    assert f"Port {port} on 127.0.0.1" in refused(folder / "other", folder / "third.log", "--port", port)
    assert get(f"{url}/healthz") == 200

    with connect(up, url) as client:
        job_id = submit_long_job(client, folder)
        assert wait_for(lambda: trains(client, job_id, attempt=1, beyond=0), START_SECONDS)

    pids = up.everything()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0, up.log.read_text()
    assert up.is_gone(pids)
    assert read_rows(up.home, "SELECT id, status, lease_token, failures FROM jobs") == [(job_id, "queued", None, 0)]
    assert [row[0] for row in read_rows(up.home, "SELECT job_id FROM resume_points")] == [job_id]
    assert read_url(up.home) is None
    assert up.log.read_text().endswith("Stopped.\n")


def test_job_goes_on_after_a_restart_and_a_killed_platform_leaves_nothing(up: Up, folder: Path) -> None:
    """Goes on with the home that the test above has left."""
    ((job_id, step),) = read_rows(up.home, "SELECT id, current_step FROM jobs")
    with connect(up, up.wait_until_up()) as client:
        assert wait_for(lambda: trains(client, str(job_id), attempt=2, beyond=int(str(step))), START_SECONDS)
    key = up.home.api_key.read_text()
    pids = up.everything()
    assert pids & set(alive_with(str(up.home.path / "runs"))), "the trainer does not run below hone up"
    up.process.kill()
    up.process.wait()
    again = Up(up.home.path, folder / "again.log", "--port", "0", "--workers", "1")
    try:
        assert wait_for(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], 10)
        url = again.wait_until_up()
        assert up.home.api_key.read_text() == key
        assert get(f"{url}/v1/models", key.strip()) == 200
        keeper = [pid for pid in alive_with("local.keeper") if pid in again.everything()]
        assert len(keeper) == 1
        pids = again.everything()
        os.kill(keeper[0], signal.SIGKILL)
        assert again.process.wait(timeout=10) != 0
        assert wait_for(lambda: again.is_gone(pids), 10)
    finally:
        if again.process.poll() is None:
            again.process.kill()
            again.process.wait()
