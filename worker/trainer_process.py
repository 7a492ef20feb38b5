"""The trainer as a process: its start, its environment, its end. It leads a session of its own, and is killed as a group.

Linux: the kernel kills the trainer when the thread that started it ends, so start it from the thread that waits for it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.run_directory import LOG, SECRETS_FD, publish_text

IDENTITY = "process.json"
"""Who runs in this run directory: host, boot, pid and start time. Only workers read it."""

ALLOWED = frozenset(
    {"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD"}
    | {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_CACHE_PATH", "NVIDIA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"}
    | {"SSL_CERT_FILE", "SSL_CERT_DIR", "HONE_UP"}
)
"""What a trainer may know of the worker's environment; neither database nor broker nor keys. HONE_UP marks the tree of `hone up`."""

CONVERTER_ALLOWED = ALLOWED | {"HF_HOME", "HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The allocator asks the kernel for huge pages, where both know them: faults on fresh memory took a seventh of an update."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Identity(NamedTuple):
    """A process for good: pids are reused, and start times begin anew with each boot."""

    host: str
    boot: str
    pid: int
    start_ticks: int


class TrainerProcess:
    """A child that leads its own session and group."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.pid = process.pid

    def has_ended(self) -> bool:
        """Whether the leader has exited. It stays a zombie until `reap`, so that its number cannot become another's."""
        if self._process.returncode is not None:
            return True
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, number: int) -> None:
        """To the trainer alone."""
        if not self.has_ended():
            os.kill(self.pid, number)

    def send_group(self, number: int) -> None:
        """To the trainer and everything that it started."""
        if self._process.returncode is None:
            os.killpg(self.pid, number)

    def reap(self, timeout_seconds: float) -> int | None:
        """Kills what is left of the group; -> the exit code (negative: the signal), None if the kernel does not let it die."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None


def start(
    command: Sequence[str],
    run_directory: Path,
    secrets: Mapping[str, Any],
    environment: Mapping[str, str],
    limits: Mapping[str, str] | None = None,
) -> TrainerProcess:
    """The trainer at work in `run_directory`. Call it from the thread that waits for it.

    `secrets`, and the `limits` that its calls share with others' ({"broker_url", "scope", "owner"}), reach it by an inherited pipe.
    """
    reading, writing = os.pipe()
    try:
        with open(run_directory / LOG, "ab") as log:
            full = [*command, str(run_directory), SECRETS_FD, str(reading)]
            process = _spawn(full, environment, log.fileno(), pass_fds=(reading,))
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    _hand_over(writing, json.dumps({"secrets": secrets, "limits": limits}).encode())
    publish_text(run_directory / IDENTITY, json.dumps(identify(process.pid)))
    return process


def start_converter(command: Sequence[str], log: Path) -> TrainerProcess:
    environment = {name: value for name, value in os.environ.items() if name in CONVERTER_ALLOWED or name.startswith("LC_")}
    with open(log, "ab") as file:
        return _spawn(command, environment, file.fileno())


def trainer_environment(num_threads: int) -> dict[str, str]:
    """The allow-listed part of our own, and what keeps the trainer to its share of the machine."""
    allowed = {name: value for name, value in os.environ.items() if name in ALLOWED or name.startswith("LC_")}
    threads = dict.fromkeys(THREAD_VARIABLES, str(num_threads))
    return {**allowed, **threads, **HUGE_PAGES, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def identify(pid: int) -> Identity:
    stat = _stat(pid)
    return Identity(os.uname().nodename, _boot(), pid, int(stat[19]) if stat else 0)


def kill_left_over(run_directory: Path) -> bool:
    """Kills what an earlier worker left running in `run_directory`, if it is on this host; whether there was anything."""
    path = run_directory / IDENTITY
    if not path.exists():
        return False
    old = Identity(*json.loads(path.read_text()))
    if (old.host, old.boot) != (os.uname().nodename, _boot()):
        return False
    members = list(_group(old.pid))
    is_reused = any(pid == old.pid and ticks != old.start_ticks for pid, ticks in members)
    if not members or is_reused:
        return False
    os.killpg(old.pid, signal.SIGKILL)
    return True


def oom_kills() -> int:
    """How many processes this machine's kernel has killed for memory since boot."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _spawn(command: Sequence[str], environment: Mapping[str, str], log: int, pass_fds: tuple[int, ...] = ()) -> TrainerProcess:
    return TrainerProcess(
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environment),
            start_new_session=True,
            pass_fds=pass_fds,
            preexec_fn=_die_with_parent(),
        )
    )


def _die_with_parent() -> Callable[[], None]:
    """Runs in the child between fork and exec. The parent may have died before the call, so it is looked at again after."""
    parent = os.getpid()

    def prepare() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _hand_over(descriptor: int, content: bytes) -> None:
    """Writes from a thread: a pipe takes only 64 KiB before its reader reads, and a child that died reads nothing."""

    def write() -> None:
        try:
            with open(descriptor, "wb") as pipe:
                pipe.write(content)
        except BrokenPipeError:
            return

    threading.Thread(target=write, name="secrets", daemon=True).start()


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat behind the name: state, parent, group, session, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


def _group(group: int) -> Iterator[tuple[int, int]]:
    """(pid, start time) of every living process in `group` that is also in the session of that number: our trainers lead both."""
    for entry in os.listdir("/proc"):
        fields = _stat(int(entry)) if entry.isdigit() else None
        if fields is not None and fields[0] != "Z" and int(fields[2]) == int(fields[3]) == group:
            yield int(entry), int(fields[19])


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
