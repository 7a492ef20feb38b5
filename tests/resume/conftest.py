from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.resume.bench import Bench, Result, table

RESULTS = pytest.StashKey[list[Result]]()


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> list[Result]:
    """What is told at the end."""
    return request.config.stash.setdefault(RESULTS, [])


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, results: list[Result]) -> Iterator[Bench]:
    """Runs all that the tests of this session ask for as `case` or `setting`, from the first on."""
    cases = parameters(request, "case")
    settings = dict.fromkeys([case.setting for case in cases] + parameters(request, "setting"))
    with Bench(tmp_path_factory.mktemp("resume"), cases, list(settings)) as running:
        yield running
    results += running.results()


def parameters(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of parameter `name` over the tests of this folder that the session runs."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path.parent == Path(__file__).parent]
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(params[name] for params in calls if name in params))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if results := config.stash.get(RESULTS, []):
        terminalreporter.section("killed and continued")
        for line in table(results):
            terminalreporter.write_line(line)
