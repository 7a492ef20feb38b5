"""Options of data and rollouts, each through the loop: test_option_<name>."""

from collections import Counter
from pathlib import Path

import pytest

from core.run_directory import TRAIN, End
from graders.grade import Grade, GradeRequest
from tests.tiny import TEMPLATE
from tests.trainer.options.observed import constant, observe
from tests.trainer.runs import FunctionGrader, make_run_directory, read_metrics, read_samples, train_here, write_rows


def test_option_n_epochs_is_how_often_each_row_is_trained_on(tmp_path: Path) -> None:
    seen = observe(tmp_path, rows=8, max_steps=None, n_epochs=3)
    rows = Counter(sample.prompt_index for sample in seen.samples if sample.g == 0)
    assert rows == Counter(dict.fromkeys(range(8), 3))


def test_option_batch_size_is_the_number_of_prompts_of_a_step(tmp_path: Path) -> None:
    seen = observe(tmp_path, batch_size=3)
    assert len({sample.prompt_index for sample in seen.samples}) == 3


def test_option_group_size_is_the_number_of_completions_of_a_prompt(tmp_path: Path) -> None:
    seen = observe(tmp_path, group_size=5)
    assert set(Counter(sample.prompt_index for sample in seen.samples).values()) == {5}


def test_option_compute_multiplier_scales_the_automatic_group_size(tmp_path: Path) -> None:
    seen = observe(tmp_path, compute_multiplier=0.5)
    assert set(Counter(sample.prompt_index for sample in seen.samples).values()) == {4}


def test_option_reasoning_effort_reaches_the_template(tmp_path: Path) -> None:
    template = "{% if reasoning_effort is defined %}{{ reasoning_effort }}.{% endif %}" + TEMPLATE
    for effort in ("default", "low", "high"):
        seen = observe(tmp_path / effort, reasoning_effort=effort, model={"hidden": 32, "template": template})
        start = "" if effort == "default" else f"{effort}."
        assert all(sample.prompt.startswith(f"{start}<user>") for sample in seen.samples)


def test_option_eval_interval_is_the_distance_of_evaluations(tmp_path: Path) -> None:
    seen = observe(tmp_path, valid_rows=1, max_steps=5, eval_interval=2)
    assert [line.step for line in read_metrics(seen.folder, "valid")] == [0, 2, 4, 5]


def test_option_eval_samples_is_the_number_of_completions_of_a_validation_row(tmp_path: Path) -> None:
    seen = observe(tmp_path, valid_rows=2, eval_samples=3)
    found = Counter((sample.step, sample.prompt_index) for sample in read_samples(seen.folder, "valid"))
    assert set(found.values()) == {3}


def test_option_max_prompt_tokens_refuses_what_is_longer(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path, max_steps=1, max_prompt_tokens=6)
    write_rows(folder / TRAIN, [{"messages": [{"role": "user", "content": "a" * length}], "letter": "a"} for length in (1, 2, 3)])
    assert train_here(folder).end is End.SUCCEEDED
    longer = make_run_directory(tmp_path / "b", max_steps=1, max_prompt_tokens=5)
    write_rows(longer / TRAIN, [{"messages": [{"role": "user", "content": "aaa"}], "letter": "a"}])
    assert train_here(longer).code == "prompt_too_long"


def test_option_max_completion_tokens_is_the_longest_completion(tmp_path: Path) -> None:
    for length in (3, 9):
        seen = observe(tmp_path / str(length), max_completion_tokens=length)
        assert seen.first("completion_tokens_max") == length
        assert {sample.num_tokens for sample in seen.samples if sample.finish_reason == "length"} == {length}


def test_option_temperature_spreads_the_distribution(tmp_path: Path) -> None:
    entropies = [observe(tmp_path / str(heat), temperature=heat).first("entropy") for heat in (0.3, 1.0, 3.0)]
    assert entropies[0] < 0.5 * entropies[1] < 0.5 * entropies[2]


@pytest.mark.parametrize(("name", "narrow", "wide"), [("top_k", 1, 48), ("top_p", 1e-6, 1.0), ("min_p", 1 - 1e-9, 0.0)])
def test_option_top_k_top_p_min_p_leave_only_the_likeliest_token_where_they_are_tight(
    tmp_path: Path, name: str, narrow: float, wide: float
) -> None:
    tight, loose, off = (observe(tmp_path / str(i), **given) for i, given in enumerate(({name: narrow}, {name: wide}, {})))
    assert tight.first("entropy") == pytest.approx(0.0, abs=1e-6)
    assert {len({s.completion for s in tight.samples if s.prompt_index == row}) for row in range(10)} <= {0, 1}
    assert [sample.completion for sample in loose.samples] == [sample.completion for sample in off.samples]
    assert loose.first("entropy") == pytest.approx(off.first("entropy"), rel=1e-5)


def test_option_dynamic_sampling_tries_so_many_rounds_for_a_group_with_signal(tmp_path: Path) -> None:
    for rounds in (0, 1, 3):
        seen = observe(tmp_path / str(rounds), FunctionGrader(constant), rows=40, dynamic_sampling=rounds)
        assert len({sample.prompt_index for sample in seen.samples}) == 4 * (1 + rounds)


def test_option_max_staleness_is_the_lag_of_the_weights_that_sampled(tmp_path: Path) -> None:
    for staleness in (0, 1):
        seen = observe(tmp_path / str(staleness), max_steps=3, max_staleness=staleness)
        assert seen.curve("weight_lag") == [0.0, staleness, staleness]


def test_option_stop_ends_a_completion_in_front_of_the_string(tmp_path: Path) -> None:
    without = observe(tmp_path / "without", max_completion_tokens=16)
    letter = Counter("".join(sample.completion for sample in without.samples)).most_common(1)[0][0]
    seen = observe(tmp_path / "with", max_completion_tokens=16, stop=[letter])
    for before, after in zip(without.samples, seen.samples, strict=True):
        assert after.completion == before.completion.partition(letter)[0]
        assert after.finish_reason == ("stop" if letter in before.completion else before.finish_reason)


def test_option_mask_truncated_leaves_cut_completions_out(tmp_path: Path) -> None:
    seen = observe(tmp_path, mask_truncated=True, max_completion_tokens=12, model={"hidden": 32, "head_scale": 6.0})
    (batch,) = seen.batches
    cut = [sample.finish_reason == "length" for sample in seen.samples]
    assert 0 < sum(cut) < len(cut)
    assert batch.counts.tolist() == [not is_cut for is_cut in cut]
    assert all(sample.advantage == 0.0 for sample, is_cut in zip(seen.samples, cut, strict=True) if is_cut)
    assert seen.outcome.trained_tokens == sum(sample.num_tokens for sample, is_cut in zip(seen.samples, cut, strict=True) if not is_cut)


def test_option_overlong_penalty_lowers_rewards_towards_the_limit(tmp_path: Path) -> None:
    seen = observe(tmp_path, FunctionGrader(constant), overlong_penalty=0.25)
    expected = [1.0 - max(0, sample.num_tokens - 6) / 2 for sample in seen.samples]
    assert seen.batches[0].rewards.tolist() == pytest.approx(expected)


def test_option_max_grader_failure_fraction_is_where_a_run_pauses(tmp_path: Path) -> None:
    def fails_for_a_quarter(request: GradeRequest) -> Grade:
        lost = request.item["letter"] == "a"
        return Grade(reward=None, error="grader_timeout") if lost else Grade(reward=1.0)

    for limit, end in ((0.2, End.PAUSED), (0.25, End.SUCCEEDED)):
        rows = [{"messages": [{"role": "user", "content": letter}], "letter": letter} for letter in "abcd"]
        seen = observe(tmp_path / str(limit), FunctionGrader(fails_for_a_quarter), train_rows=rows, max_grader_failure_fraction=limit)
        assert seen.outcome.end is end
    assert seen.first("grader_failure_fraction") == 0.25
