"""The unit-test grader of examples/, in the sandbox, on code as models write it."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from core.specs import parse_grader
from examples.unit_tests import GRADER
from graders.build import build_grader
from graders.check import check_programs
from outbound.safe_http import NetworkPolicy
from tests.graders.helpers import grade_all, request

ROOT = Path(__file__).parents[2]
TESTS = ["add(1, 2) == 3", "add(-1, 1) == 0", "add('a', 'b') == 'ab'", "add(2, 2) == 4"]
RIGHT = "def add(a, b):\n    return a + b\n"
COMPLETIONS = {
    "right": (RIGHT, 1.0),
    "fenced, with words around it": (f"Here it is:\n```python\n{RIGHT}```\nIt adds.", 1.0),
    "right for numbers alone": ("def add(a, b):\n    return int(a) + int(b)\n", 0.75),
    "wrong": ("def add(a, b):\n    return a - b\n", 0.0),
    "no code": ("I cannot do this.", 0.0),
    "syntax error": ("def add(a, b)\n    return a + b", 0.0),
    "loops": ("def add(a, b):\n    while True:\n        a += 0 if b else 0\n", 0.0),
    "loops on loading": ("while True:\n    x = 1", 0.0),
    "exits": ("import sys\ndef add(a, b):\n    sys.exit(0)", 0.0),
    "recurses": ("def add(a, b):\n    return add(a, b)", 0.0),
    "takes all memory": ("def add(a, b):\n    return bytearray(4 << 30)", 0.0),
    "result that equals everything": ("class Any:\n    def __eq__(self, other):\n        return 1\ndef add(a, b):\n    return Any()", 0.0),
    "reads a file": ("def add(a, b):\n    return open('/etc/passwd').read()", 0.0),
    "uses the standard library": ("import functools, operator\nadd = operator.add", 1.0),
}


def test_share_of_the_tests_that_pass_is_the_reward() -> None:
    spec: Any = parse_grader(GRADER)
    asyncio.run(check_programs(spec))
    requests = [request(text, item={"tests": TESTS}) for text, _ in COMPLETIONS.values()]
    started = time.monotonic()
    grades = asyncio.run(_graded(spec, requests))
    assert {name: each.reward for name, each in zip(COMPLETIONS, grades, strict=True)} == {
        n: reward for n, (_, reward) in COMPLETIONS.items()
    }
    assert time.monotonic() - started < 30


async def _graded(spec: Any, requests: list[Any]) -> list[Any]:
    return await grade_all(build_grader(spec, {}, NetworkPolicy()), *requests)


def test_program_prints_the_grader_that_a_job_takes() -> None:
    command = [sys.executable, "-m", "examples.unit_tests"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    assert parse_grader(json.loads(printed)) == parse_grader(GRADER)
