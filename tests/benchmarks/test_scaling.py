import pytest
import torch

from benchmarks.measured_step import MeasuredStep, make_options, number_tokenizer, random_model
from benchmarks.operations import Shape, Work
from benchmarks.scaling import Cost, Point, axes, exponent, make_table, measure

SMALL = Shape(hidden=16, intermediate=32, layers=1, heads=2, kv_heads=1, head_dim=8, vocabulary=64)
LARGER = Shape(hidden=32, intermediate=64, layers=1, heads=2, kv_heads=1, head_dim=16, vocabulary=64)
POINT = Point(SMALL, Work(prompts=2, group_size=4, prompt_tokens=8, completion_tokens=16), "float32", "cpu", threads=1, repeats=1)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power_is_the_power(power: float) -> None:
    sizes = [3.0, 6.0, 12.0, 48.0]
    assert exponent(sizes, [0.7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_exponent_of_what_is_no_power_is_the_least_squares_slope() -> None:
    # In powers of two: (0, 0), (1, 0), (2, 2). Through the mean (1, 2/3) the slope is (-1 * -2/3 + 1 * 4/3) / 2.
    assert exponent([1, 2, 4], [1, 1, 4]) == pytest.approx(1.0)


def test_each_axis_changes_one_size_and_begins_at_the_base() -> None:
    lines = axes(POINT, [SMALL, LARGER])
    assert [axis.points[0] for axis in lines] == [POINT] * 4
    assert [axis.sizes for axis in lines] == [[4, 8, 16], [16, 32, 64], [2, 4, 8], [SMALL.parameters, LARGER.parameters]]
    assert lines[1].points[2].work == Work(prompts=2, group_size=4, prompt_tokens=8, completion_tokens=64)
    assert lines[3].points[1] == Point(LARGER, POINT.work, "float32", "cpu", threads=1, repeats=1)


def test_table_names_every_size_with_its_exponents() -> None:
    lines = axes(POINT, [SMALL, LARGER])[:1]
    measured = {point: Cost(1.0, float(size) ** 2, 1e9 * size) for size, point in zip(lines[0].sizes, lines[0].points, strict=True)}
    rows = [[cell.strip("* ") for cell in line.strip("|").split("|")] for line in make_table(measured, lines).splitlines()]
    assert rows[2][:5] == ["group size", "4", "1.00", "16.00", "4.00"]
    assert rows[-1][:5] == ["exponent of group size", "", "0.00", "2.00", "1.00"]


def test_point_is_measured_in_a_process_of_its_own() -> None:
    """Spawns one: peak memory is of a process, and this one has had others."""
    cost = measure(POINT)
    assert cost.rollout > 0
    assert cost.update > 0
    assert 5e7 < cost.peak_bytes < 2e9


def test_measured_step_samples_whole_completions_and_trains_on_them() -> None:
    model = random_model(SMALL)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = MeasuredStep(model, number_tokenizer(64), POINT.work, "float32", torch.device("cpu"))
    seconds = step.run()
    assert set(seconds) == {"rollout", "update", "optimizer"}
    assert all(value > 0 for value in seconds.values())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert [len(rollout.token_ids) for rollout in step.generate()] == [16] * 8


def test_options_are_those_of_the_work() -> None:
    options = make_options(POINT.work, "bf16")
    assert (options.batch_size, options.group_size, options.max_completion_tokens, options.precision) == (2, 4, 16, "bf16")
    assert not options.needs_reference
