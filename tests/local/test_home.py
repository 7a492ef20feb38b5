import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from local.home import CannotStart, Home, clear_leftovers, find_port, lock_home, prepare_home, read_url, write_facts
from local.processes import MARKER, read_process
from tests.local.trees import wait_for


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return prepare_home(tmp_path / "home", tmp_path / "home/run/valkey.sock")


def test_run_folder_is_for_the_owner_only_even_if_it_was_open_before(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o777)
    home = prepare_home(tmp_path, tmp_path / "run/valkey.sock")
    assert stat.S_IMODE(home.run.stat().st_mode) == 0o700


def test_home_too_deep_for_a_unix_socket_is_refused_by_name(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    with pytest.raises(CannotStart, match="too long for a unix socket"):
        prepare_home(deep, deep / "run/valkey.sock")


def test_second_lock_names_the_process_and_the_address_of_the_first(home: Home) -> None:
    descriptor = lock_home(home)
    write_facts(home, "http://127.0.0.1:8123")
    with pytest.raises(CannotStart, match=rf"pid {os.getpid()}.*http://127.0.0.1:8123"):
        lock_home(home, patience_seconds=0)
    assert read_url(home) == "http://127.0.0.1:8123"
    os.close(descriptor)
    os.close(lock_home(home, patience_seconds=0))


def test_reused_pid_is_not_taken_for_a_running_platform(home: Home) -> None:
    own = read_process(os.getpid())
    assert own is not None
    home.facts.write_text(json.dumps({"pid": own.pid, "start_ticks": own.start_ticks - 1, "url": "http://x"}))
    assert read_url(home) is None


def test_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=rf"Port {port} on 127.0.0.1 .*--port"):
            find_port("127.0.0.1", port)
    assert find_port("127.0.0.1", 0) > 0


def test_leftovers_of_this_home_are_ended_and_those_of_another_are_not(home: Home, tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    left = subprocess.Popen(sleep, env={**os.environ, MARKER: str(home.path)})
    other = subprocess.Popen(sleep, env={**os.environ, MARKER: str(tmp_path / "other")})
    (home.run / "valkey.sock").touch()
    (home.run / "beat.db").touch()
    try:
        assert wait_for(lambda: MARKER.encode() in Path(f"/proc/{left.pid}/environ").read_bytes(), 5)
        assert clear_leftovers(home) == 1
        assert left.wait(timeout=5) == -9
        assert other.poll() is None
        assert list(home.run.iterdir()) == []
    finally:
        left.kill()
        other.kill()
        left.wait()
        other.wait()
