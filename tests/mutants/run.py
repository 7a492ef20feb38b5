"""`make test-mutants [BUGS="r01 r05"]`: each known bug, put back by a small patch, must make the tests that are named after it fail.

Without a patch all of them pass. On a patch at least one test of its bug fails, by assertion; each test fails on one patch at least.
The first line of a patch says what it does.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "tests/mutants"
TESTS = "tests/known_bugs"
COPIED = ("core", "graders", "outbound", "trainer", "tests/__init__.py", "tests/fake_endpoint.py", "tests/tiny.py", "tests/trainer", TESTS)
COPIED += ("pyproject.toml",)
"""Without what the database needs, whose import would take longer than most tests here."""
SECONDS = 300
WORKERS = 2
BY_ASSERTION = ("AssertionError", "assert ", "Failed: DID NOT RAISE")


@dataclass(frozen=True)
class Result:
    """What became of the tests of one bug in one copy of the tree."""

    failed: frozenset[str]
    """Test functions with a failed assertion."""

    problem: str = ""
    """Why this says nothing; the first error that was not a failed assertion."""


def known_tests() -> dict[str, set[str]]:
    """`r01` -> its test functions."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / TESTS).glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_(r\d\d)_", node.name)):
                found.setdefault(match[1], set()).add(node.name)
    return found


def known_patches() -> dict[str, list[Path]]:
    """`r01` -> r01.patch, or r01_a.patch, r01_b.patch and so on."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PATCHES.glob("*.patch")):
        found.setdefault(path.stem.split("_")[0], []).append(path)
    return found


def description(patch: Path) -> str:
    return patch.read_text().partition("\n")[0]


def apply(patch: Path, folder: Path, *options: str) -> str:
    """Applies `patch` to the tree in `folder`; -> why it does not apply, or nothing."""
    process = subprocess.run(["git", "apply", *options, str(patch)], cwd=folder, capture_output=True, text=True, check=False)
    return process.stderr.strip()


def run_with(patch: Path | None, bugs: Iterable[str]) -> Result:
    """Runs the tests of `bugs` on a copy of the tree with `patch`."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for part in COPIED:
            (folder / part).parent.mkdir(exist_ok=True)
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, folder / part)
        if patch is not None and (refusal := apply(patch, folder)):
            return Result(frozenset(), f"does not apply: {refusal}")
        return _run_tests(folder, " or ".join(f"test_{bug}_" for bug in bugs))


def _run_tests(folder: Path, keyword: str) -> Result:
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", TESTS, "-k", keyword, f"--junitxml={report}", "-p", "no:cacheprovider"]
    quick = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # With these set, pytest explains differences whole, which takes minutes where they are long.
    quick |= {"CI": "", "BUILD_NUMBER": ""}
    try:
        process = subprocess.run(
            command, cwd=folder, env={**os.environ, **quick}, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Result(frozenset(), f"took more than {SECONDS} seconds")
    if process.returncode not in (0, 1) or not report.exists():
        return Result(frozenset(), f"the tests did not run: {process.stdout[-500:]}{process.stderr[-500:]}")
    return _read(report)


def _read(report: Path) -> Result:
    failed, problem = set(), ""
    for case in ElementTree.parse(report).iter("testcase"):
        for trouble in [*case.iter("failure"), *case.iter("error")]:
            message = trouble.get("message", "")
            if trouble.tag == "failure" and message.startswith(BY_ASSERTION):
                failed.add(case.get("name", "").partition("[")[0])
            else:
                problem = problem or f"{case.get('name')}: {message.splitlines()[0]}"
    return Result(frozenset(failed), problem)


def main(bugs: list[str]) -> int:
    """-> 0 where every mutant is caught and every test has caught one."""
    tests, patches = known_tests(), known_patches()
    bugs = bugs or sorted(tests | patches)
    chosen = [patch for bug in bugs for patch in patches.get(bug, [])]
    complaints: list[str] = []
    idle = {test for bug in bugs for test in tests.get(bug, set())}
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        plain = pool.submit(run_with, None, bugs)
        for patch, result in zip(chosen, pool.map(lambda patch: run_with(patch, [patch.stem.split("_")[0]]), chosen), strict=True):
            verdict = "caught" if result.failed else "BROKEN" if result.problem else "SURVIVED"
            print(f"{patch.stem:6} {verdict:8} {description(patch)}", *sorted(result.failed), sep="\n                ", flush=True)
            if not result.failed:
                complaints.append(f"{patch.stem} {verdict.lower()}: {result.problem or 'no test fails'}")
            idle -= result.failed
        untouched = plain.result()
    complaints += [f"{test} fails without a patch" for test in sorted(untouched.failed)]
    complaints += [f"without a patch: {untouched.problem}"] if untouched.problem else []
    complaints += [f"{test} fails on no patch" for test in sorted(idle)]
    print(f"\n{len(chosen)} mutants, {len(complaints)} complaints", *complaints, sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
