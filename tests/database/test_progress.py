import math

import pytest
from sqlalchemy import func, select

from core.errors import InvalidRequest, LeaseLost
from core.run_directory import EVENTS, METRICS, SAMPLES, EventLine
from database.leases import expire_leases
from database.models import Event, Metric, RelayOffset, Sample
from database.progress import (
    add_event,
    list_digests,
    list_events,
    list_metrics,
    list_samples,
    relay_offset,
    spread_samples,
    store_events,
    store_metrics,
    store_samples,
)
from tests.database.rows import claim, in_threads, make_running, metrics_line, read_job, sample_line, write_old_deadline


def store(database, function, held, file, offset, lines, token=None):
    with database.transaction() as session:
        function(session, held.job.id, token or held.token, held.attempt, file=file, offset=offset, lines=lines)


def event_line(message):
    return EventLine(created_at=5.0, level="info", message=message)


def all_rows(database, table, *columns):
    with database.reading() as session:
        return session.execute(select(*columns).select_from(table).order_by(*columns)).all()


def next_attempt(database, held):
    write_old_deadline(database, held.job.id)
    with database.transaction() as session:
        expire_leases(session, max_attempts=9)
        return claim(session)


@pytest.mark.parametrize(
    ("function", "file", "table", "lines"),
    [
        (store_events, EVENTS, Event, [event_line("a"), event_line("b")]),
        (store_metrics, METRICS, Metric, [metrics_line(1, reward=0.5), metrics_line(1, "valid", reward=0.25)]),
        (store_samples, SAMPLES, Sample, [sample_line(1, 0, 1.0), sample_line(1, 1, None)]),
    ],
)
def test_the_same_lines_stored_twice_change_nothing(database, function, file, table, lines):
    _, held = make_running(database)
    columns = [column for column in table.__table__.columns if column.name != "data"]

    def state():
        rows = all_rows(database, table, *[column for column in columns if column.name != "sub_scores"])
        return rows, all_rows(database, RelayOffset, RelayOffset.offset, RelayOffset.lines), read_job(database, held.job.id).seq

    store(database, function, held, file, 120, lines)
    before = state()
    store(database, function, held, file, 120, lines)
    assert state() == before
    assert before[1] == [(120, 2)]
    with database.reading() as session:
        assert relay_offset(session, held.job.id, held.attempt, file) == 120
        assert relay_offset(session, held.job.id, held.attempt, "other") == 0


def test_lines_of_an_old_token_are_refused_and_leave_no_row_and_no_offset(database):
    _, held = make_running(database)
    newer = next_attempt(database, held)
    for function, file, lines in (
        (store_events, EVENTS, [event_line("late")]),
        (store_metrics, METRICS, [metrics_line(1, reward=0.5)]),
        (store_samples, SAMPLES, [sample_line(1, 0, 1.0)]),
    ):
        with pytest.raises(LeaseLost):
            store(database, function, held, file, 10, lines)
    assert all_rows(database, Metric, Metric.name) == []
    assert all_rows(database, Sample, Sample.g) == []
    assert all_rows(database, RelayOffset, RelayOffset.offset) == []
    store(database, store_metrics, newer, METRICS, 10, [metrics_line(1, reward=0.5)])
    assert all_rows(database, Metric, Metric.attempt) == [(2,)]


def test_rows_and_offset_are_stored_together_or_not_at_all(database):
    """The second line breaks a constraint of the table, after the first one and the offset were written."""
    _, held = make_running(database)
    broken = sample_line(1, 1, 1.0).model_copy(update={"prompt": None})
    with pytest.raises(Exception, match=r"(?i)null"):
        store(database, store_samples, held, SAMPLES, 50, [sample_line(1, 0, 1.0), broken])
    assert all_rows(database, Sample, Sample.g) == []
    assert all_rows(database, RelayOffset, RelayOffset.offset) == []
    assert read_job(database, held.job.id).seq == held.job.seq


def test_metrics_say_how_far_the_job_is(database):
    _, held = make_running(database)
    store(database, store_metrics, held, METRICS, 10, [metrics_line(0, "valid", reward=0.1)])
    assert read_job(database, held.job.id).current_step is None
    store(database, store_metrics, held, METRICS, 20, [metrics_line(1, reward=0.1), metrics_line(2, reward=0.2)])
    job = read_job(database, held.job.id)
    assert (job.current_step, job.total_steps) == (2, 6)
    assert job.estimated_finish >= job.updated_at - 0.01


def test_a_number_that_is_not_finite_is_stored_as_none(database):
    _, held = make_running(database)
    store(database, store_metrics, held, METRICS, 10, [metrics_line(1, a=math.nan, b=math.inf, c=1.0)])
    assert sorted(all_rows(database, Metric, Metric.name, Metric.value)) == [("a", None), ("b", None), ("c", 1.0)]


def test_an_attempt_that_resumes_overwrites_and_a_poller_sees_the_new_value(database):
    _, held = make_running(database)
    lines = [metrics_line(step, digest=f"d{step}", reward=step / 10) for step in (1, 2, 3)]
    store(database, store_metrics, held, METRICS, 30, lines)
    with database.reading() as session:
        cursor = list_metrics(session, held.job.id).items[-1].seq
    again = next_attempt(database, held)
    store(database, store_metrics, again, METRICS, 10, [metrics_line(3, digest="d3", reward=0.9)])
    with database.reading() as session:
        new = list_metrics(session, held.job.id, after=cursor).items
        codes = [event.data.get("code") for event in list_events(session, held.job.id, after=None, limit=50).items]
    assert [(metric.step, metric.value, metric.attempt) for metric in new] == [(3, 0.9, 2)]
    assert "resume_diverged" not in codes
    assert len(all_rows(database, Metric, Metric.step)) == 3


def test_a_resumed_step_that_differs_warns(database):
    _, held = make_running(database)
    store(database, store_metrics, held, METRICS, 30, [metrics_line(1, digest="a", r=0.0), metrics_line(2, digest="b", r=0.0)])
    again = next_attempt(database, held)
    store(database, store_metrics, again, METRICS, 30, [metrics_line(1, digest="a", r=0.0), metrics_line(2, digest="c", r=0.0)])
    with database.reading() as session:
        newest = list_events(session, held.job.id, after=None, limit=1).items[0]
    assert (newest.level, newest.data) == ("warn", {"code": "resume_diverged", "step": 2, "phase": "train"})


def chain(database, held):
    with database.reading() as session:
        return [(row.step, row.digest) for row in list_digests(session, held.job.id, after=None, limit=50).items]


def test_the_chain_of_a_resumed_job_ends_where_the_job_stands_now(database):
    """What the first attempt did beyond the resume point belongs to a chain that was given up."""
    _, held = make_running(database)
    first = [metrics_line(step, digest=f"d{step}", r=0.0) for step in (1, 2, 3, 4)]
    store(database, store_metrics, held, METRICS, 40, [*first, metrics_line(4, "valid", r=0.0)])
    assert chain(database, held) == [(1, "d1"), (2, "d2"), (3, "d3"), (4, "d4")]
    again = next_attempt(database, held)
    store(database, store_metrics, again, METRICS, 10, [metrics_line(3, digest="e3", r=0.0)])
    assert chain(database, again) == [(1, "d1"), (2, "d2"), (3, "e3")]


def test_max_points_thins_each_curve_evenly_and_keeps_its_newest(database):
    _, held = make_running(database)
    lines = [metrics_line(step, reward=float(step), kl=0.0) for step in range(1, 11)]
    store(database, store_metrics, held, METRICS, 10, [*lines, metrics_line(10, "valid", reward=1.0)])
    with database.reading() as session:
        page = list_metrics(session, held.job.id, names=["reward"], max_points=4)
        train = [metric.step for metric in page.items if metric.phase == "train"]
        valid = [metric.step for metric in page.items if metric.phase == "valid"]
        whole = list_metrics(session, held.job.id, max_points=50)
        first = list_metrics(session, held.job.id, limit=5)
    assert (train, valid) == ([1, 4, 7, 10], [10])
    assert len(whole.items) == 21
    assert (len(first.items), first.has_more) == (5, True)


def test_events_page_newest_first_with_unique_ids_and_refuse_an_unknown_after(database):
    _, held = make_running(database)
    store(database, store_events, held, EVENTS, 99, [event_line(f"line {number}") for number in range(5)])
    seen, after = [], None
    with database.reading() as session:
        while True:
            page = list_events(session, held.job.id, after=after, limit=3)
            seen += page.items
            if not page.has_more:
                break
            after = page.items[-1].id
        with pytest.raises(InvalidRequest) as caught:
            list_events(session, held.job.id, after="ftevent-no", limit=3)
    assert caught.value.param == "after"
    assert [event.message for event in seen[:5]] == [f"line {number}" for number in (4, 3, 2, 1, 0)]
    assert [event.line for event in seen[:5]] == [4, 3, 2, 1, 0]
    assert len({event.id for event in seen}) == len(seen) == 8
    assert all(event.id.startswith("ftevent-") for event in seen)


def test_numbers_of_events_written_at_once_have_no_gap_and_no_double(database):
    _, held = make_running(database)

    def tell():
        for _ in range(5):
            with database.transaction() as session:
                add_event(session, held.job.id, level="info", message="x")

    start = read_job(database, held.job.id).seq
    in_threads([tell] * 3)
    with database.reading() as session:
        numbers = session.execute(select(Event.seq).where(Event.message == "x").order_by(Event.seq)).scalars().all()
        assert session.execute(select(func.count()).select_from(Event)).scalar_one() == start + 15
    assert numbers == list(range(start + 1, start + 16))


def test_samples_are_listed_as_they_came_or_by_reward_with_ungraded_last(database):
    _, held = make_running(database)
    rewards = [0.5, None, 1.0, 0.5, None, 0.0]
    store(database, store_samples, held, SAMPLES, 9, [sample_line(1, g, reward) for g, reward in enumerate(rewards)])
    store(database, store_samples, held, SAMPLES, 18, [sample_line(2, 0, 0.75, phase="valid", sub_scores={"a": 0.5})])

    def pages(session, **options):
        seen, after = [], None
        while True:
            page = list_samples(session, held.job.id, after=after, limit=2, **options)
            seen += page.items
            if not page.has_more:
                return seen
            after = page.items[-1].seq

    with database.reading() as session:
        assert [sample.g for sample in pages(session, step=1)] == [0, 1, 2, 3, 4, 5]
        assert [sample.g for sample in pages(session, step=1, order="reward")] == [5, 0, 3, 2, 1, 4]
        assert [sample.g for sample in pages(session, step=1, order="-reward")] == [2, 0, 3, 5, 1, 4]
        assert [sample.reward for sample in pages(session, order="reward", min_reward=0.5, max_reward=0.75)] == [0.5, 0.5, 0.75]
        assert [sample.sub_scores for sample in pages(session, phase="valid")] == [{"a": 0.5}]
        with pytest.raises(InvalidRequest) as caught:
            list_samples(session, held.job.id, after=10**9)
    assert caught.value.param == "after"


def test_samples_are_told_apart_by_what_became_of_their_grade(database):
    _, held = make_running(database)
    lines = [
        sample_line(1, 0, 0.0),
        sample_line(1, 1, None),
        sample_line(1, 2, None, error="grader_timeout", error_message="No answer within 5 seconds."),
        sample_line(1, 3, None, error="grader_http_error", grader_version="grader_a@2"),
    ]
    store(database, store_samples, held, SAMPLES, 9, lines)
    with database.reading() as session:

        def found(**options):
            return [sample.g for sample in list_samples(session, held.job.id, **options).items]

        assert [found(status=status) for status in ("graded", "abstained", "failed")] == [[0], [1], [2, 3]]
        assert (found(error="grader_timeout"), found(error="grader_timeout", status="graded")) == ([2], [])
        assert (found(grader_version="grader_a@2"), found(grader_version="inline", order="reward")) == ([3], [0, 1, 2])
        (timeout,) = list_samples(session, held.job.id, error="grader_timeout").items
    assert timeout.error_message == "No answer within 5 seconds."


def test_samples_to_grade_again_are_spread_evenly_over_the_graded_ones(database):
    _, held = make_running(database)
    lines = [sample_line(step, g, None if g == 1 else 0.5) for step in range(1, 6) for g in range(3)]
    store(database, store_samples, held, SAMPLES, 9, [*lines, sample_line(5, 0, 1.0, phase="valid")])
    with database.reading() as session:

        def spread(limit, step=None, phase=None):
            samples, total = spread_samples(session, held.job.id, step=step, phase=phase, limit=limit)
            return [(sample.step, sample.g) for sample in samples], total

        assert spread(100, phase="train") == ([(step, g) for step in range(1, 6) for g in (0, 2)], 10)
        assert spread(5, phase="train") == ([(step, 0) for step in range(1, 6)], 10)
        assert spread(4, phase="train")[0] == [(1, 0), (2, 2), (4, 0), (5, 2)]
        assert spread(100, step=5, phase="valid") == ([(5, 0)], 1)
        assert spread(100, step=9) == ([], 0)


def test_a_hostile_completion_is_stored_readable(database):
    _, held = make_running(database)
    store(database, store_samples, held, SAMPLES, 9, [sample_line(1, 0, 1.0, completion="a\x00b'; DROP TABLE jobs; --")])
    assert all_rows(database, Sample, Sample.completion) == [("a\ufffdb'; DROP TABLE jobs; --",)]
