"""The layers between a user's program and this machine: limits, a user of its own, Landlock, a filter of system calls. Linux only.

Each is set and then tried; one that does not hold is an error and the program is not run. Standard library only: the sandbox imports it.
"""

import ctypes
import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

NOBODY = 65534
MAX_OPEN_FILES = 16
PROT_EXEC = 4

# include/uapi/linux/prctl.h, landlock.h, seccomp.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 1, 4, 38, 39
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF, _LANDLOCK_VERSION = 444, 446, 1
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Landlock's version -> how many rights to files it knows; 16 from version 5 on."""
_SECCOMP_SET_MODE_FILTER = 1
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
"""What the filter answers: go on, EPERM, or death."""

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_SECCOMP = (317, 277)
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "alarm": (37, None),
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "fstat": (5, 80),
    "futex": (202, 98),
    "getitimer": (36, 102),
    "getpid": (39, 172),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "read": (0, 63),
    "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "setitimer": (38, 103),
    "sigaltstack": (131, 132),
    "time": (201, None),
    "times": (100, 153),
    "write": (1, 64),
}
"""All that a program may ask of the kernel: memory, time, random bytes, and reading and writing what is open. (x86_64, aarch64)."""
_MAPPINGS = {"mmap": (9, 222), "mprotect": (10, 226)}
"""Allowed for memory that is not executable."""


class NotConfined(Exception):
    """A layer could not be set up here, or does not hold."""


def confine(memory_bytes: int, seconds: float, parent: int) -> None:
    """Takes all layers on, for good. `memory_bytes` come on top of what is in use. Raises: NotConfined naming the layer."""
    if sys.platform != "linux" or os.uname().machine not in _ARCHITECTURES:
        raise NotConfined(f"there is no sandbox for {sys.platform} on {os.uname().machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    _layer("limits", lambda: _limit(memory_bytes, seconds))
    if os.geteuid() == 0:
        _layer("user", _become_nobody)
    _layer("privileges", lambda: _give_up_privileges(libc, parent))
    _layer("landlock", lambda: _lock_files(libc))
    _layer("seccomp", lambda: _filter_calls(libc))


def _layer(name: str, set_up: Callable[[], None]) -> None:
    try:
        set_up()
    except (OSError, ValueError) as error:
        raise NotConfined(f"{name}: {error}") from error


def _limit(memory_bytes: int, seconds: float) -> None:
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: in_use + memory_bytes,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
        if resource.getrlimit(kind) != (limit, limit):
            raise OSError("a limit was not taken on")


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _expect_refusal("the way back to root", lambda: os.setuid(0))


def _give_up_privileges(libc: ctypes.CDLL, parent: int) -> None:
    """After the change of user, which would undo the first two. From here on the process ends with its parent."""
    _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1:
        raise OSError("new ones can still be had")
    if os.getppid() != parent:
        raise OSError("the parent has ended")


def _lock_files(libc: ctypes.CDLL) -> None:
    """No file can be opened from here on; where the kernel knows it, no TCP port, no abstract socket and no process outside either."""
    version = _check(libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION))
    files = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    rights = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _check(libc.syscall(_LANDLOCK_CREATE_RULESET, rights, ctypes.c_size_t(size), 0))
    _check(libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0))
    os.close(rules)
    _expect_refusal("reading a folder", lambda: os.open("/", os.O_RDONLY))


def _filter_calls(libc: ctypes.CDLL) -> None:
    _, column = _ARCHITECTURES[os.uname().machine]
    program = _filter_program()
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _check(libc.syscall(_SECCOMP[column], _SECCOMP_SET_MODE_FILTER, 0, header))
    _expect_refusal("a socket", socket.socket)
    _expect_refusal("a process", os.fork)


def _filter_program() -> bytes:
    """Classic BPF over `struct seccomp_data`: the number of the call is at 0, the architecture at 4, the third argument at 32."""
    load, equal, has_bits, answer = 0x20, 0x15, 0x45, 0x06
    architecture, column = _ARCHITECTURES[os.uname().machine]
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, _KILL), (load, 0, 0, 0)]
    for numbers in _MAPPINGS.values():
        steps += [
            (equal, 0, 4, numbers[column]),
            (load, 0, 0, 32),
            (has_bits, 0, 1, PROT_EXEC),
            (answer, 0, 0, _REFUSE),
            (answer, 0, 0, _ALLOW),
        ]
    for number in (numbers[column] for numbers in _CALLS.values()):
        if number is not None:
            steps += [(equal, 0, 1, number), (answer, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (answer, 0, 0, _REFUSE)])


def _expect_refusal(what: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except PermissionError:
        return
    raise OSError(f"{what} is still allowed")


def _check(result: int) -> int:
    """`result` of a call of libc. Raises: OSError with errno."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
