"""A Python function as a signed HTTP grader: `hone graders serve`. Needs nothing but the client's installation.

Speaks the wire formats `single` and `batch`. Runs the author's program in this process: it is not for programs of others.
"""

import importlib.util
import json
import logging
import math
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from core.errors import InvalidRequest, NotAuthenticated, boundary
from outbound.signing import sign, verify

logger = logging.getLogger("hone.grader")
GradeFunction = Callable[[dict[str, Any], dict[str, Any]], Any]
MAX_BODY_BYTES = 64 * 1024 * 1024
IDLE_SECONDS = 60.0


def load_grade(path: Path) -> GradeFunction:
    """`grade` of the program at `path`. Raises: InvalidRequest when it does not run or defines no such function."""
    spec = importlib.util.spec_from_file_location("grader", path)
    if spec is None or spec.loader is None:
        raise InvalidRequest(f"{path} is not a Python program: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["grader"] = module
    sys.path.insert(0, str(path.resolve().parent))
    with boundary(InvalidRequest, f"{path} does not run"):
        spec.loader.exec_module(module)
    grade = getattr(module, "grade", None)
    if not callable(grade):
        raise InvalidRequest(f"{path} must define a function grade(sample, item).")
    return cast(GradeFunction, grade)


def verdict(value: Any) -> dict[str, Any]:
    """What `grade` returned, as the wire has it: a number, None to abstain, or the whole reply as a dict. Raises: TypeError."""
    if isinstance(value, dict):
        if "score" not in value:
            raise TypeError("grade() returned a dict without 'score'")
        return {**value, **verdict(value["score"])}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value)):
        raise TypeError(f"grade() must return a finite number, None or a dict with 'score', not {value!r:.100}")
    return {"score": value}


def answer(grade: GradeFunction, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request. Raises: what `grade` raises; KeyError or TypeError for a request of another shape."""
    if "samples" not in request:
        return verdict(grade(request["sample"], request["item"]))
    return {"results": [{**verdict(grade(each["sample"], each["item"])), "id": each["id"]} for each in request["samples"]]}


class GraderServer(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, host: str, port: int, grade: GradeFunction, secret: str) -> None:
        """Raises: InvalidRequest for a secret that nothing can be signed with."""
        sign(secret, "start", 0, b"")
        self.grade, self.secret = grade, secret
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    wbufsize = 65536  # head and body in one packet
    server: GraderServer

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            return self._reply(411, {"error": f"send a content-length of at most {MAX_BODY_BYTES}"})
        body = self.rfile.read(int(length))
        try:
            verify(self.server.secret, dict(self.headers.items()), body)
            request = json.loads(body)
            assert isinstance(request, dict)
        except NotAuthenticated as error:
            return self._reply(401, {"error": error.message})
        except (ValueError, AssertionError):
            return self._reply(400, {"error": "the body must be a JSON object"})
        try:
            return self._reply(200, answer(self.server.grade, request))
        except Exception as error:
            logger.exception("grade() failed")
            return self._reply(500, {"error": f"{type(error).__name__}: {error}"})

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """One line per call would drown the tracebacks."""
