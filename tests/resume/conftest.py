from collections.abc import Iterator

import pytest

from tests.resume.bench import Bench, Result, table

RESULTS = pytest.StashKey[list[Result]]()


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> list[Result]:
    """What is told at the end."""
    return request.config.stash.setdefault(RESULTS, [])


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, results: list[Result]) -> Iterator[Bench]:
    """Runs all cases that this session asks for, from the first on."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = list(dict.fromkeys(params["case"] for params in calls if "case" in params))
    with Bench(tmp_path_factory.mktemp("resume"), cases) as running:
        yield running
    results += running.results()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if results := config.stash.get(RESULTS, []):
        terminalreporter.section("killed and continued")
        for line in table(results):
            terminalreporter.write_line(line)
