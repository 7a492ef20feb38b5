"""Importing opens nothing; starting needs a prepared home; a broker that is away delays no answer."""

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.ringer import Ringer
from core.errors import StorageError
from core.settings import Settings
from database.secrets import ensure_secret_key
from tests.api.platform import assert_error

ROOT = Path(__file__).parents[2]


def test_import_touches_no_disk_and_no_torch(tmp_path: Path) -> None:
    """In a process of its own: modules of other tests would hide what the import pulls in."""
    home = tmp_path / "home"
    code = "import api.app, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = {**os.environ, "HONE_HOME": str(home), "HONE_DATABASE_URL": "no url at all"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False)
    assert process.returncode == 0, process.stderr
    assert not home.exists()


def test_start_without_a_secret_key_fails(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="secret key"), TestClient(create_app(Settings(home=tmp_path))):
        pass


def test_ready_only_when_the_tables_are_there(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    ensure_secret_key(settings)
    with TestClient(create_app(settings), raise_server_exceptions=False) as http:
        assert http.get("/healthz").status_code == 200
        assert_error(http.get("/readyz"), 503, "service_unavailable")


def test_ringing_never_waits_and_piled_up_rings_become_one() -> None:
    started, go_on, rings = Event(), Event(), []

    def slow() -> bool:
        rings.append(1)
        started.set()
        assert go_on.wait(10)
        return True

    ringer = Ringer(slow)
    ringer.ring()
    assert started.wait(10)
    began = time.monotonic()
    for _ in range(100):
        ringer.ring()
    assert time.monotonic() - began < 1.0
    go_on.set()
    ringer.close()
    assert len(rings) == 2


def test_ringer_survives_a_bell_that_fails() -> None:
    rang, calls = Event(), []

    def fails_once() -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("broker library broke")
        rang.set()
        return True

    ringer = Ringer(fails_once)
    ringer.ring()
    deadline = time.monotonic() + 10
    while not calls and time.monotonic() < deadline:
        time.sleep(0.01)
    ringer.ring()
    assert rang.wait(10)
    ringer.close()
