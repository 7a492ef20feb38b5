"""`python -m trainer RUN_DIRECTORY [--secrets-fd N]`: runs the job in the directory and writes outcome.json, last of all.

Exit status: 0 whenever there is an outcome, 3 where another trainer holds the directory. Alone it needs no worker:
it then reads secrets from nowhere, holds limits on calls by itself, and goes on from the directory's own newest resume point.
"""

import argparse
import ctypes
import fcntl
import json
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import IO, Any

from core.redaction import Redactor, secret_values, url_secrets
from core.run_directory import CONTROL, LOCK, OUTCOME, SECRETS_FD, End, publish_json, read_outcome
from graders.build import build_grader
from graders.limits import local_limiter
from graders.shared_limits import SharedLimits
from trainer.control import ControlReader, Pulse
from trainer.loop import run_job
from trainer.redaction import RedactingFormatter
from trainer.session import MakeGrader, Secrets

PR_SET_PDEATHSIG = 1
HELD_BY_ANOTHER = 3

log = logging.getLogger("trainer")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer", description="Runs the training job in a run directory.")
    parser.add_argument("run_directory", type=Path)
    parser.add_argument(SECRETS_FD, type=int, default=None, help="descriptor of a pipe that holds the job's secrets as JSON")
    given = parser.parse_args(arguments)
    handed = {} if given.secrets_fd is None else read_handed(given.secrets_fd)
    secrets, limits = handed.get("secrets", {}), handed.get("limits")
    redactor = Redactor([*secret_values(secrets), *(url_secrets(limits["broker_url"]) if limits else ())])
    set_up_log(redactor)
    directory: Path = given.run_directory.resolve()
    lock = hold(directory)
    if lock is None:
        log.error("another trainer holds %s", directory)
        return HELD_BY_ANOTHER
    with lock:
        make_limiter = SharedLimits(**limits) if limits else local_limiter
        return 0 if has_ended(directory) else run(directory, secrets, redactor, partial(build_grader, make_limiter=make_limiter))


def run(directory: Path, secrets: Secrets, redactor: Redactor, make_grader: MakeGrader) -> int:
    pulse = Pulse(directory)
    control = ControlReader(directory, pulse)
    control.install()
    outcome = run_job(directory, secrets, control, pulse, make_grader)
    pulse.stop()
    publish_json(directory / OUTCOME, outcome.model_copy(update={"message": redactor.clean_optional(outcome.message)}))
    log.info("ended %s after step %d", outcome.end, outcome.step)
    return 0


def read_handed(descriptor: int) -> dict[str, Any]:
    """Everything on the worker's pipe: {"secrets", "limits"}. From here on this process ends with the worker."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the worker has ended")
    with open(descriptor, "rb") as pipe:
        handed: dict[str, Any] = json.loads(pipe.read())
    return handed


def set_up_log(redactor: Redactor) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter(redactor))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def hold(directory: Path) -> IO[str] | None:
    """The directory's lock, held as long as the file is open; None where another trainer has it."""
    lock = open(directory / LOCK, "w")  # noqa: SIM115 - held for the life of the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def has_ended(directory: Path) -> bool:
    """Whether there is nothing left to do. A paused run that is started again goes on: its old outcome and request are dropped."""
    outcome = read_outcome(directory)
    if outcome is not None and outcome.end is End.PAUSED:
        (directory / OUTCOME).unlink()
        (directory / CONTROL).unlink(missing_ok=True)
        return False
    return outcome is not None


if __name__ == "__main__":
    sys.exit(main())
