"""Waits between attempts. How services that misbehave are called is tested through the graders that call them."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from graders.calls import RetryPolicy, _retry_after


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [(None, 0, 0), ("5", 5, 5), ("soon", 0, 0), ("-5", 0, 0), ("nan", 0, 0), ("9" * 30, 0, 0)],
)
def test_retry_after_in_seconds(value: str | None, low: float, high: float) -> None:
    assert low <= _retry_after(value) <= high


def test_retry_after_as_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=20), usegmt=True)
    assert 15 < _retry_after(soon) <= 20
    assert _retry_after(past) == 0.0


def test_waits_double_with_full_jitter_up_to_the_cap() -> None:
    policy = RetryPolicy(base_seconds=1.0, cap_seconds=4.0)
    for attempt, most in [(1, 1.0), (2, 2.0), (3, 4.0), (9, 4.0)]:
        waits = [policy.wait_seconds(attempt, 0.0) for _ in range(300)]
        assert 0.0 <= min(waits) < 0.2 * most
        assert 0.8 * most < max(waits) <= most
