"""The sandbox for all of Python: a process that imports, never runs a program itself, and forks a confined child for every grade.

Started by `full_python`, without the environment of its parent. Standard library only.
"""

import importlib
import json
import linecache
import os
import random
import select
import signal
import socket
import sys
import traceback
import types
from typing import Any, NoReturn

from graders.confinement import NotConfined, confine

READY, CONFINED, REFUSED = b"r", b"+", b"-"
PROGRAM = "grader.py"
MAX_TEXT = 4_000
MAX_INTEGER_BITS = 1_100
"""A larger one is beyond every float."""

MODULES = [
    "abc",
    "array",
    "ast",
    "base64",
    "binascii",
    "bisect",
    "calendar",
    "cmath",
    "collections.abc",
    "colorsys",
    "contextlib",
    "copy",
    "csv",
    "ctypes",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.utf_16",
    "enum",
    "errno",
    "fractions",
    "functools",
    "gc",
    "graphlib",
    "hashlib",
    "heapq",
    "hmac",
    "html.entities",
    "html.parser",
    "inspect",
    "io",
    "itertools",
    "json",
    "keyword",
    "linecache",
    "locale",
    "math",
    "numbers",
    "operator",
    "os.path",
    "pickle",
    "pprint",
    "queue",
    "random",
    "re",
    "reprlib",
    "secrets",
    "shlex",
    "signal",
    "socket",
    "statistics",
    "string",
    "struct",
    "subprocess",
    "sys",
    "textwrap",
    "threading",
    "time",
    "timeit",
    "token",
    "tokenize",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "unittest",
    "unittest.mock",
    "urllib.parse",
    "uuid",
    "warnings",
    "weakref",
    "xml.etree.ElementTree",
    "zlib",
]
"""What a program can import, with what these import; nothing can be read from a file once it runs."""

_OUT_OF_MEMORY = b'{"error": "memory"}'


def main() -> None:
    """Each message on the control socket brings the connection of one grade; the answer is how its child ended."""
    control = socket.socket(fileno=int(sys.argv[1]))
    memory_bytes, seconds = int(sys.argv[2]), float(sys.argv[3])
    os.environ.clear()
    for name in MODULES:
        importlib.import_module(name)
    sys.path.clear()
    sys.argv[:] = [""]
    linecache.lazycache = linecache.checkcache = lambda *_: False  # type: ignore[assignment]
    control.sendall(READY)
    parent = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        child = os.fork()
        if child == 0:
            control.close()
            _grade(descriptors[0], memory_bytes, seconds, parent)
        os.close(descriptors[0])
        control.sendall(_watch(child, control).to_bytes(4, "little"))


def _watch(child: int, control: socket.socket) -> int:
    """The status with which `child` ends. Where our own parent ends before, both of us end at once."""
    descriptor = os.pidfd_open(child)
    watched: list[int | socket.socket] = [descriptor, control]
    ready, _, _ = select.select(watched, [], [])
    if descriptor not in ready:
        os.killpg(0, signal.SIGKILL)
    os.close(descriptor)
    return os.waitpid(child, 0)[1]


def _grade(connection: int, memory_bytes: int, seconds: float, parent: int) -> NoReturn:
    """Asks for the program only when every layer holds."""
    try:
        confine(memory_bytes, seconds, parent)
    except NotConfined as error:
        os.write(connection, REFUSED + str(error).encode())
        os._exit(0)
    os.write(connection, CONFINED)
    try:
        reply = json.dumps(_answer(json.loads(_read(connection)))).encode()
    except MemoryError:
        reply = _OUT_OF_MEMORY
    while reply:
        reply = reply[os.write(connection, reply) :]
    os._exit(0)


def _read(connection: int) -> bytes:
    parts = []
    while part := os.read(connection, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """What the program says, in a form that JSON has. Raises: MemoryError."""
    source = question["source"]
    linecache.cache[PROGRAM] = (len(source), None, source.splitlines(keepends=True), PROGRAM)
    module = types.ModuleType("grader")
    sys.modules["grader"] = module
    random.seed(0)
    try:
        exec(compile(source, PROGRAM, "exec", dont_inherit=True), module.__dict__)
        if "grade" not in module.__dict__:
            return {"error": "runtime", "text": "The program must define grade(sample, item)."}
        grade = module.__dict__["grade"]
        return _described(grade(question["sample"], question["item"]) if "sample" in question else grade)
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its failure
        kind = "unsupported" if type(error) is ModuleNotFoundError else "runtime"
        return {"error": kind, "text": _traceback(error)}


def _described(value: Any) -> dict[str, Any]:
    """A number as it is; of everything else the name of its type and whether it can be called."""
    if type(value) is float or (type(value) is int and value.bit_length() <= MAX_INTEGER_BITS):
        return {"value": value}
    if type(value) is int:
        return {"value": float("inf")}
    return {"type": str(type(value).__name__)[:100], "callable": callable(value)}


def _traceback(error: BaseException) -> str:
    """Without our own frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != PROGRAM:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace, limit=-8))
    return text.strip()[-MAX_TEXT:]
