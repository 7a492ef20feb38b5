"""Programs that users write, and programs that attackers write, in the real sandbox."""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InvalidRequest
from graders.grade import Grade
from graders.python_sandbox import MAX_SECONDS, PythonGrader, SandboxLimits
from tests.graders.helpers import grade, grade_all, request

LIMITS = SandboxLimits(seconds=10.0, memory_bytes=64 * 1024 * 1024, num_processes=1)
HURRIED = replace(LIMITS, seconds=0.4)

BENIGN = {
    "exact": ("def grade(sample, item):\n    return 1.0 if sample['output_text'] == item['answer'] else 0.0", 1.0),
    "any names": ("def grade(s, i):\n    return 0.5", 0.5),
    "int": ("def grade(sample, item):\n    return 1", 1.0),
    "negative": ("def grade(sample, item):\n    return -2.5", -2.5),
    "regex": ("import re\ndef grade(s, i):\n    return float(re.findall(r'-?\\d+', s['output_text'])[-1] == i['answer'])", 1.0),
    "json": ("import json\ndef grade(s, i):\n    return json.loads('{\"x\": 0.25}')['x']", 0.25),
    "math": ("import math\ndef grade(s, i):\n    return math.exp(-abs(float(s['output_text']) - 4))", 1.0),
    "helper and constant": ("W = 0.5\ndef part(text):\n    return len(text) * W\ndef grade(s, i):\n    return part(s['output_text'])", 0.5),
    "exception handled": ("def grade(s, i):\n    try:\n        return float(i['missing'])\n    except KeyError:\n        return 0.1", 0.1),
    "class": ("class A:\n    def __init__(self, x):\n        self.x = x\ndef grade(s, i):\n    return A(0.75).x", 0.75),
    "choices": ("def grade(s, i):\n    return 1.0 if s['choices'][0]['finish_reason'] == 'stop' else 0.0", 1.0),
    "prints": ("def grade(s, i):\n    print('hello', s)\n    return 1.0", 1.0),
    "collections": ("from collections import Counter\ndef grade(s, i):\n    return Counter('aab')['a'] / 2", 1.0),
    "lambda": ("grade = lambda s, i: 0.5", 0.5),
    "own globals called sample": ("sample = item = 3\ndef grade(s, i):\n    return sample + item", 6.0),
    "generator, which only all of Python has": ("def g():\n    yield 1\ndef grade(s, i):\n    return sum(g())", 1.0),
    "inheritance, which only all of Python has": ("class B(dict):\n    pass\ndef grade(s, i):\n    return len(B(a=1))", 1.0),
    "sleeps": ("import time\ndef grade(s, i):\n    time.sleep(30)\n    return 1.0", 1.0),
}

RUNTIME, UNSUPPORTED, TIMEOUT, MEMORY = (
    "python_grader_runtime_error",
    "python_grader_unsupported",
    "python_grader_timeout",
    "python_grader_out_of_memory",
)
BROKEN = {
    "raises": ("def grade(s, i):\n    raise ValueError('boo')", RUNTIME, "ValueError: boo"),
    "missing column": ("def grade(s, i):\n    return i['gold']", RUNTIME, "KeyError"),
    "wrong arguments": ("def grade(s):\n    return 1.0", RUNTIME, "argument"),
    "syntax": ("def grade(s, i:\n    return 1.0", RUNTIME, "SyntaxError"),
    "no grade": ("def score(s, i):\n    return 1.0", RUNTIME, "must define grade"),
    "not callable": ("grade = 1.0", RUNTIME, "not callable"),
    "numpy": ("import numpy\ndef grade(s, i):\n    return 1.0", UNSUPPORTED, "numpy"),
    "none": ("def grade(s, i):\n    pass", "grader_invalid_score", "NoneType"),
    "string": ("def grade(s, i):\n    return '1'", "grader_invalid_score", "str"),
    "bool": ("def grade(s, i):\n    return True", "grader_invalid_score", "bool"),
    "nan": ("def grade(s, i):\n    return float('nan')", "grader_invalid_score", "NaN"),
    "infinite": ("def grade(s, i):\n    return 10 ** 400", "grader_invalid_score", "infinite"),
    "coroutine": ("async def grade(s, i):\n    return 1.0", "grader_invalid_score", "str"),
}

HOSTILE = {
    "loop": ("def grade(s, i):\n    while True:\n        pass", TIMEOUT),
    "loop at the top": ("while True:\n    pass", TIMEOUT),
    "loop that catches": (
        "def grade(s, i):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        TIMEOUT,
    ),
    "endless print": ("def grade(s, i):\n    while True:\n        print('x' * 1000)", TIMEOUT),
    "memory in pieces": ("def grade(s, i):\n    x = []\n    while True:\n        x.append('a' * 1000000)", MEMORY),
    "memory at once": ("def grade(s, i):\n    return len('a' * (3 << 30))", MEMORY),
    "big integer": ("def grade(s, i):\n    return len(str(10 ** 100000000))", MEMORY),
    "recursion": ("def f(n):\n    return f(n + 1)\ndef grade(s, i):\n    return f(0)", RUNTIME),
    "deep source": ("x = " + "(" * 5000 + "1" + ")" * 5000, RUNTIME),
    "read a file": ("def grade(s, i):\n    return len(open('/etc/passwd').read())", RUNTIME),
    "write a file": ("def grade(s, i):\n    open('ESCAPE', 'w').write('x')\n    return 1.0", RUNTIME),
    "pathlib": ("from pathlib import Path\ndef grade(s, i):\n    return len(Path('/etc/passwd').read_text())", RUNTIME),
    "environment": ("import os\ndef grade(s, i):\n    return len(os.environ['HONE_TEST_SECRET'])", RUNTIME),
    "getenv": ("import os\ndef grade(s, i):\n    return len(os.getenv('HONE_TEST_SECRET'))", RUNTIME),
    "socket": ("import socket\ndef grade(s, i):\n    socket.create_connection(('127.0.0.1', PORT))\n    return 1.0", RUNTIME),
    "urllib": ("import urllib.request\ndef grade(s, i):\n    return 1.0", UNSUPPORTED),
    "subprocess": ("import subprocess\ndef grade(s, i):\n    return subprocess.run(['true']).returncode", RUNTIME),
    "os.system": ("import os\ndef grade(s, i):\n    return os.system('true') and None", RUNTIME),
    "ctypes": ("import ctypes\ndef grade(s, i):\n    return ctypes.string_at(0)", RUNTIME),
    "class climb": ("def grade(s, i):\n    return len(().__class__.__base__.__subclasses__())", RUNTIME),
    "import function": ("def grade(s, i):\n    return __import__('os').listdir('/')", RUNTIME),
    "exit": ("def grade(s, i):\n    raise SystemExit(0)", RUNTIME),
    "interrupt": ("def grade(s, i):\n    raise KeyboardInterrupt", RUNTIME),
}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.mark.parametrize("name", BENIGN)
def test_program_that_people_write_is_graded(name: str) -> None:
    source, reward = BENIGN[name]
    result = grade(PythonGrader(source, LIMITS))
    assert (result.reward, result.error, result.error_message) == (reward, None, None)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_program_is_a_failed_grade_that_says_why(name: str) -> None:
    source, code, text = BROKEN[name]
    result = grade(PythonGrader(source, LIMITS))
    assert (result.reward, result.error) == (None, code)
    assert text in (result.error_message or "")
    assert not result.is_outage


@pytest.mark.parametrize("name", HOSTILE)
def test_attack_is_a_failed_grade_and_leaves_nothing(
    name: str, listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_TEST_SECRET", "s3cret-env")
    source, code = HOSTILE[name]
    source = source.replace("PORT", str(listener.getsockname()[1])).replace("ESCAPE", str(tmp_path / "escape"))
    started = time.monotonic()
    result = grade(PythonGrader(source, HURRIED if code == TIMEOUT else LIMITS))
    assert (result.reward, result.error) == (None, code)
    assert "s3cret-env" not in repr(result)
    assert time.monotonic() - started < 8.0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_a_regular_expression_that_explodes_is_bounded() -> None:
    source = "import re\ndef grade(s, i):\n    return 1.0 if re.match('(a+)+$', 'a' * 60 + 'b') else 0.0"
    started = time.monotonic()
    grade(PythonGrader(source, LIMITS))
    assert time.monotonic() - started < 5.0


def worker_processes(min_cpu_ticks: int = 0) -> list[int]:
    """Sandbox processes of ours that are alive (not merely unreaped) and have worked for at least so many ticks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        state, parent, ticks = fields[0], int(fields[1]), int(fields[11]) + int(fields[12])
        if parent == os.getpid() and state != "Z" and b"monty" in command and ticks >= min_cpu_ticks:
            found.append(int(folder.name))
    return found


async def workers_left(seconds: float = 3.0) -> list[int]:
    """The processes that are still there after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := worker_processes()) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return left


def test_sandbox_process_has_an_empty_environment_and_ends_with_the_grader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_TEST_SECRET", "s3cret-env")

    async def look() -> tuple[list[bytes], list[int]]:
        grader = PythonGrader("def grade(s, i):\n    return 1.0", LIMITS)
        await grader.grade(request())
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in worker_processes()]
        await grader.close()
        return environments, await workers_left()

    environments, left = asyncio.run(look())
    assert environments == [b""]
    assert left == []


def test_nothing_stays_from_one_grade_to_the_next() -> None:
    source = "seen = []\ndef grade(s, i):\n    seen.append(1)\n    s['output_text'] = 'changed'\n    return len(seen)"
    results = asyncio.run(grade_all(PythonGrader(source, LIMITS), *[request() for _ in range(5)]))
    assert [result.reward for result in results] == [1.0] * 5


def test_random_numbers_are_the_same_for_the_same_completion() -> None:
    source = "import random\ndef grade(s, i):\n    return random.random()"
    results = asyncio.run(grade_all(PythonGrader(source, LIMITS), request(), request()))
    assert results[0].reward == results[1].reward is not None


def test_a_program_that_loops_does_not_stop_the_others() -> None:
    source = "def grade(s, i):\n    while s['output_text'] == 'loop':\n        pass\n    return 1.0"
    requests = [request("loop"), *[request("fine") for _ in range(5)]]
    results = asyncio.run(grade_all(PythonGrader(source, HURRIED), *requests))
    assert [result.reward for result in results] == [None, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cancel_kills_the_running_program_at_once() -> None:
    async def cancel() -> tuple[float, list[int], Grade]:
        limits = SandboxLimits(seconds=60.0, num_processes=1)
        grader = PythonGrader("def grade(s, i):\n    while s['output_text'] == 'loop':\n        pass\n    return 1.0", limits)
        task = asyncio.create_task(grader.grade(request("loop")))
        while not worker_processes(min_cpu_ticks=5):
            await asyncio.sleep(0.01)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seconds = time.monotonic() - started
        return seconds, await workers_left(), (await grade_all(grader, request("fine")))[0]

    seconds, left, after = asyncio.run(cancel())
    assert seconds < 2.0
    assert left == []
    assert after.reward == 1.0


def test_killed_sandbox_process_is_replaced_and_the_grade_asked_again() -> None:
    async def kill_once() -> Grade:
        grader = PythonGrader("def grade(s, i):\n    while True:\n        pass", replace(LIMITS, seconds=1.0))
        task = asyncio.create_task(grader.grade(request()))
        while not worker_processes(min_cpu_ticks=5):
            await asyncio.sleep(0.01)
        for pid in worker_processes():
            os.kill(pid, 9)
        result = await task
        await grader.close()
        return result

    result = asyncio.run(kill_once())
    assert (result.error, result.attempts) == (TIMEOUT, 2)


@pytest.mark.parametrize("binary", ["/nonexistent/monty", "/bin/true"])
def test_without_a_sandbox_the_program_is_refused_not_run(binary: str, tmp_path: Path) -> None:
    source = f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\ndef grade(s, i):\n    return 1.0"
    result = grade(PythonGrader(source, LIMITS, binary_path=Path(binary)))
    assert (result.reward, result.error) == (None, "python_grader_server_error")
    assert result.is_outage
    assert list(tmp_path.iterdir()) == []


def test_no_limit_is_above_two_minutes() -> None:
    limits = SandboxLimits(seconds=10_000.0).as_resource_limits()
    assert limits["max_feed_duration_secs"] == MAX_SECONDS == 120.0
    assert limits["max_total_sleep_secs"] == 0.0


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("def grade(s, i:\n    return 1.0", RUNTIME),
        ("def score(s, i):\n    return 1.0", RUNTIME),
        ("grade = 3", RUNTIME),
        ("import numpy\ndef grade(s, i):\n    return 1.0", UNSUPPORTED),
        ("while True:\n    pass", TIMEOUT),
    ],
)
def test_check_refuses_a_program_that_does_not_load(source: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(PythonGrader(source, HURRIED if code == TIMEOUT else LIMITS).check(param="grader.source"))
    assert (caught.value.code, caught.value.param) == (code, "grader.source")


def test_check_accepts_a_program_that_loads() -> None:
    asyncio.run(PythonGrader("def grade(s, i):\n    return i['column that only rows have']", LIMITS).check())
