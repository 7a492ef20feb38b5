"""The table, from numbers that are known."""

from benchmarks.grader_latency import LOOPS, make_table


def test_each_ratio_is_to_the_same_loop_with_a_grader_of_0_ms() -> None:
    on_policy, stale, serial = LOOPS
    measured = {(0.0, on_policy): 2.0, (0.0, stale): 4.0, (0.0, serial): 1.0}
    measured |= {(0.5, on_policy): 3.0, (0.5, stale): 5.0, (0.5, serial): 9.0}
    assert make_table(measured).splitlines() == [
        "| grader | on-policy | `max_staleness` 1 | serial loop |",
        "| --- | --- | --- | --- |",
        "| 0 ms | 2.00 s (1.00 x) | 4.00 s (1.00 x) | 1.00 s (1.00 x) |",
        "| 500 ms | 3.00 s (1.50 x) | 5.00 s (1.25 x) | 9.00 s (9.00 x) |",
    ]


def test_loops_differ_in_what_they_are_named_after() -> None:
    on_policy, stale, serial = LOOPS
    assert (on_policy.max_staleness, stale.max_staleness, serial.max_staleness) == (0, 1, 0)
    assert (on_policy.max_concurrency, stale.max_concurrency, serial.max_concurrency) == (16, 16, 1)
