import pytest

from tests.graders_behaviour.bench import Result, table

RESULTS = pytest.StashKey[list[Result]]()


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> list[Result]:
    """What is told at the end."""
    return request.config.stash.setdefault(RESULTS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if results := config.stash.get(RESULTS, []):
        terminalreporter.section("graders that misbehave")
        for line in table(results):
            terminalreporter.write_line(line)
