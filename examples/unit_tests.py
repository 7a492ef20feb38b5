"""A grader for completions that are code: runs the code against the row's tests and gives the share that passed. Prints the job's grader.

A row: {"messages": [...], "tests": ["add(1, 2) == 3", "add(-1, 1) == 0"]}. Each test is an expression; true counts as passed.
"""

import json

SECONDS_PER_TEST = 1.0

SOURCE = f'''
import re, signal

SECONDS = {SECONDS_PER_TEST}


def code_of(text):
    """The last fenced block, else all of it."""
    blocks = re.findall(r"```(?:python)?[ \\t]*\\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text


class OutOfTime(BaseException):
    """Not an Exception: code under test that catches those does not catch this."""


def stop(number, frame):
    raise OutOfTime


def is_true(test, names, evaluate=eval, true=True):
    """Whether `test` is true in time. Whatever the code raises, SystemExit included, is a test that failed."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return evaluate(test, names) is true
    except BaseException:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def loaded(code):
    """The names that the code defines, None where it does not load."""
    names = {{"__name__": "solution"}}
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        exec(compile(code, "solution.py", "exec"), names)
        return names
    except BaseException:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def grade(sample, item):
    signal.signal(signal.SIGALRM, stop)
    names = loaded(code_of(sample["output_text"]))
    if names is None:
        return 0.0
    return sum(is_true(test, dict(names)) for test in item["tests"]) / len(item["tests"])
'''

GRADER = {"type": "python", "name": "unit_tests", "interpreter": "cpython", "source": SOURCE}

if __name__ == "__main__":
    print(json.dumps(GRADER, indent=1))
