"""Lines become rows once, whole ones only, and a bad one is an error that loses nothing before it."""

import pytest
from sqlalchemy import event, func, select

from core.run_directory import EVENTS, METRICS, EventLine
from core.settings import Settings
from database.models import Event, Metric
from tests.database.rows import metrics_line
from tests.worker.jobs import make_worker, read_steps, submit
from worker.context import Holding
from worker.relay import InvalidOutput, Relay
from worker.tasks import claim_next


@pytest.fixture
def holding(settings: Settings) -> Holding:
    worker = make_worker(settings)
    submit(worker)
    holding = Holding(worker, claim_next(worker))
    holding.directory.mkdir(parents=True)
    return holding


def append(holding: Holding, name: str, content: bytes) -> None:
    with open(holding.directory / name, "ab") as file:
        file.write(content)


def line(step: int) -> bytes:
    return metrics_line(step, attempt=1.0).model_dump_json().encode() + b"\n"


def count(holding: Holding, table: type) -> int:
    with holding.worker.database.reading() as session:
        return session.execute(select(func.count()).select_from(table).where(table.job_id == holding.job_id)).scalar_one()


def test_line_is_stored_when_it_is_whole_and_once(holding: Holding) -> None:
    relay = Relay(holding, holding.directory, 1)
    append(holding, METRICS, line(1) + line(2)[:20])
    words = EventLine(created_at=1.0, level="info", message="one").model_dump_json().encode() + b"\n"
    append(holding, EVENTS, words * 2)
    before = count(holding, Event)
    for _ in range(2):
        relay.forward_new_lines()
        assert read_steps(holding.worker, holding.job_id) == {1: 1}
        assert count(holding, Event) == before + 2
    append(holding, METRICS, line(2)[20:])
    Relay(holding, holding.directory, 1).forward_new_lines()
    assert read_steps(holding.worker, holding.job_id) == {1: 1, 2: 1}


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_database_is_not_asked_while_nothing_new_is_written(holding: Holding) -> None:
    statements: list[str] = []
    append(holding, METRICS, line(1) + line(2)[:20])
    relay = Relay(holding, holding.directory, 1)
    relay.forward_new_lines()
    event.listen(holding.worker.database.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    relay.forward_new_lines()
    assert statements == []
    append(holding, METRICS, line(2)[20:])
    relay.forward_new_lines()
    assert read_steps(holding.worker, holding.job_id) == {1: 1, 2: 1}


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_bad_line_is_an_error_and_what_came_before_it_is_stored(holding: Holding) -> None:
    append(holding, METRICS, line(1) + b'{"step": "x"}\n' + line(2))
    relay = Relay(holding, holding.directory, 1)
    for _ in range(2):
        with pytest.raises(InvalidOutput, match=r"metrics\.jsonl.*'step'"):
            relay.forward_new_lines()
        assert read_steps(holding.worker, holding.job_id) == {1: 1}


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_number_that_is_not_finite_is_stored_as_missing(holding: Holding) -> None:
    bad = metrics_line(1, a=float("nan"), b=float("inf"), c=1.0)
    append(holding, METRICS, bad.model_dump_json().encode() + b"\n")
    Relay(holding, holding.directory, 1).forward_new_lines()
    with holding.worker.database.reading() as session:
        values = dict(session.execute(select(Metric.name, Metric.value).where(Metric.job_id == holding.job_id)).all())
    assert values == {"a": None, "b": None, "c": 1.0}
