"""`hone up`: the whole platform on one machine, as one process tree.

This process holds the terminal and passes its signals on; local/keeper.py, its child, is the parent of everything else.
If this process is killed, the keeper sees the end of its pipe and kills the whole tree; if the keeper is killed, the
processes die with it (PR_SET_PDEATHSIG) and this process kills what they leave.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from core.settings import Settings
from local import processes
from local.home import CannotStart, Home, clear_leftovers, find_port, lock_home, prepare_home, write_facts
from local.machine import SERVER_MODULES, list_gpus, missing_modules


def up(home: Path | None, host: str, port: int, workers: int | None) -> int:
    """Runs until a signal or a failure; the exit code. Raises: CannotStart."""
    missing = missing_modules(SERVER_MODULES)
    if missing:
        raise CannotStart(f'Not installed: {", ".join(missing)}. Install the server: pip install "hone[server]" (or "hone[train]").')
    settings = Settings(home=home) if home else Settings()
    place = prepare_home(settings.home, settings.socket_path)
    lock = lock_home(place)
    left = clear_leftovers(place)
    if left:
        sys.stdout.write(f"Ended {left} process{'es' if left > 1 else ''} of an earlier run.\n")
    port = find_port(host, port)
    write_facts(place, f"http://{host}:{port}")
    sys.stdout.flush()
    return keep(place, {"home": str(place.path), "host": host, "port": port, "workers": workers or max(1, len(list_gpus()))}, lock)


def keep(place: Home, options: dict[str, object], lock: int) -> int:
    """Starts the keeper, passes signals on to it and returns its exit code. The lock lives as long as either of us."""
    processes.adopt_orphans()
    keeper = subprocess.Popen(
        [sys.executable, "-m", "local.keeper"], stdin=subprocess.PIPE, start_new_session=True, pass_fds=(lock,), cwd=place.run
    )
    pipe = keeper.stdin
    assert pipe is not None
    asked = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        order = b"now\n" if asked else b"stop\n"
        asked = True
        try:
            os.write(pipe.fileno(), order)
        except BrokenPipeError:
            return

    os.write(pipe.fileno(), json.dumps(options).encode() + b"\n")
    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, pass_on)
    try:
        return keeper.wait()
    finally:
        processes.kill_descendants()
        place.facts.unlink(missing_ok=True)
