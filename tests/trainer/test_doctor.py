import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.options import Options
from core.run_directory import EVENTS, VALID, Control, End, write_control
from graders.grade import Grade, GradeRequest
from tests.trainer.runs import FunctionGrader, letter_rows, make_run_directory, read_metrics, read_samples, train_here, write_rows
from trainer.batch import Prompt, Rollout
from trainer.checkpoints import Progress
from trainer.doctor import COOL_DOWN, RECOVERY, RULES, DoctorState, Finding, examine
from trainer.history import REMEMBERED, WINDOW
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, Sampling

TINY: dict[str, Any] = {"rows": 8, "model": {"hidden": 32, "head_scale": 10.0}, "max_completion_tokens": 24}
"""About 3 nats, and answers of about 15 tokens."""

CALM = {
    "reward_mean": 0.5,
    "reward_std": 0.4,
    "zero_variance_group_fraction": 0.2,
    "entropy": 2.0,
    "clip_fraction": 0.01,
    "kl_reference": 0.02,
    "explained_variance": 0.4,
    "completion_tokens_mean": 100.0,
    "truncated_fraction": 0.1,
    "grader_failure_fraction": 0.01,
    "grad_norm": 0.5,
    "sampler_mismatch_kl": 1e-4,
}
"""A step of a healthy run."""


def early_letters(request: GradeRequest) -> float:
    """How much of the completion comes before n in the alphabet."""
    text = request.output_text
    return sum(character < "n" for character in text) / len(text) if text else 0.0


def warnings(folder: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    return [event for event in events if event["data"].get("code") == "run_doctor"]


def the_warning(folder: Path, rule: str) -> dict[str, Any]:
    """The evidence of the only event of `rule`, whose means are those of metrics.jsonl."""
    (event,) = [event for event in warnings(folder) if event["data"]["rule"] == rule]
    evidence: dict[str, Any] = event["data"]["evidence"]
    assert event["level"] == "warn"
    assert event["data"]["advice"] in event["message"]
    window = range(evidence["last_step"] - WINDOW + 1, evidence["last_step"] + 1)
    lines = [line.values for line in read_metrics(folder) if line.step in window]
    assert len(lines) == WINDOW or rule == "overfitting"
    for name in (evidence.keys() & REMEMBERED) - {"explained_variance"}:
        assert evidence[name] == pytest.approx(statistics.fmean(values[name] for values in lines))
    return evidence


def run(folder: Path, grade: Callable[[GradeRequest], Grade | float], **options: Any) -> Path:
    make_run_directory(folder, **{**TINY, **options})
    assert train_here(folder, FunctionGrader(grade)).end is End.SUCCEEDED
    return folder


# Each rule has a run that truly has the trouble.


def test_a_grader_that_always_says_the_same_is_no_signal(tmp_path: Path) -> None:
    evidence = the_warning(run(tmp_path / "group", lambda _: 0.5, max_steps=11), "no_signal")
    assert (evidence["zero_variance_group_fraction"], evidence["reward_std"], evidence["last_step"]) == (1.0, 0.0, 10)
    alone = run(tmp_path / "alone", lambda _: 0.5, max_steps=11, algorithm="ppo", group_size=1)
    assert the_warning(alone, "no_signal")["reward_std"] == 0.0


def test_one_rewarded_token_and_a_large_learning_rate_collapse_the_entropy(tmp_path: Path) -> None:
    def grade(request: GradeRequest) -> float:
        return request.output_text.count("a") / 24

    evidence = the_warning(run(tmp_path / "run", grade, max_steps=16, learning_rate=1e-2), "entropy_collapse")
    assert evidence["entropy"] <= 0.2 * evidence["first_entropy"]


def test_many_passes_with_a_large_learning_rate_saturate_the_clip(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", early_letters, max_steps=10, learning_rate=1e-3, epochs_per_batch=8, max_completion_tokens=8)
    assert the_warning(folder, "clip_saturation")["clip_fraction"] >= 0.3


def test_hardly_any_penalty_and_a_large_learning_rate_let_the_kl_grow(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", early_letters, max_steps=20, kl_coefficient=1e-6, learning_rate=1e-3, max_completion_tokens=8)
    evidence = the_warning(folder, "kl_growing")
    before = [line.values["kl_reference"] for line in read_metrics(folder)[:10]]
    assert evidence["kl_reference_before"] == pytest.approx(statistics.fmean(before))
    assert (evidence["first_step"], evidence["last_step"]) == (1, 20)


def test_a_value_model_that_does_not_learn_explains_nothing(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", early_letters, algorithm="ppo", max_steps=20, value_learning_rate=1e-12, max_completion_tokens=8)
    assert the_warning(folder, "critic_explains_nothing")["explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_a_grader_that_pays_for_length_gets_it(tmp_path: Path) -> None:
    folder = run(
        tmp_path / "run", lambda request: len(request.output_text) / 96, max_steps=14, learning_rate=5e-4, max_completion_tokens=96
    )
    evidence = the_warning(folder, "length_explosion")
    assert evidence["completion_tokens_mean"] >= 2 * evidence["first_completion_tokens_mean"]


def test_what_the_training_rows_want_and_the_validation_rows_do_not_is_overfitting(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", **{**TINY, "max_completion_tokens": 8}, max_steps=8, eval_interval=2)
    write_rows(folder / VALID, [{**row, "is_held_out": True} for row in letter_rows(8)])

    def grade(request: GradeRequest) -> float:
        return 1 - early_letters(request) if "is_held_out" in request.item else early_letters(request)

    train_here(folder, FunctionGrader(grade))
    evidence = the_warning(folder, "overfitting")
    valid = {line.step: line.values["valid_reward_mean"] for line in read_metrics(folder, "valid")}
    assert valid[evidence["last_step"]] == evidence["valid_reward_mean"] < evidence["first_valid_reward_mean"]
    assert valid[evidence["first_step"]] == evidence["first_valid_reward_mean"]
    assert evidence["reward_mean"] > evidence["first_reward_mean"]


def test_an_entropy_bonus_that_drowns_the_reward_lets_it_fall(tmp_path: Path) -> None:
    before = run(tmp_path / "before", lambda _: 0.0, max_steps=1)
    counts = Counter("".join(sample.completion for sample in read_samples(before)))
    usual = {character for character, _ in counts.most_common(10)}

    def grade(request: GradeRequest) -> float:
        text = request.output_text
        return sum(character in usual for character in text) / len(text) if text else 0.0

    evidence = the_warning(run(tmp_path / "run", grade, max_steps=14, learning_rate=1e-3, entropy_coefficient=10.0), "reward_falling")
    assert evidence["reward_mean"] < evidence["first_reward_mean"]


def test_a_limit_that_no_answer_fits_is_reported(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", early_letters, max_steps=10, max_completion_tokens=1, model={"hidden": 32})
    assert the_warning(folder, "truncated_completions")["truncated_fraction"] >= 0.95


def test_a_grader_that_fails_almost_too_often_is_reported_before_it_pauses_the_job(tmp_path: Path) -> None:
    graded = iter(range(1_000_000))

    def grade(request: GradeRequest) -> Grade | float:
        return Grade(reward=None, error="grader_invalid_score") if next(graded) % 7 == 0 else early_letters(request)

    evidence = the_warning(run(tmp_path / "run", grade, max_steps=10), "grader_failures")
    assert 0.1 < evidence["grader_failure_fraction"] < evidence["max_grader_failure_fraction"] == 0.2


def test_rewards_in_the_thousands_without_a_scale_are_seen_in_the_gradient(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", lambda request: 1e4 * early_letters(request), max_steps=10, advantage_scale="none", learning_rate=1e-4)
    evidence = the_warning(folder, "gradient_clipped")
    assert evidence["least_grad_norm"] == min(line.values["grad_norm"] for line in read_metrics(folder))


def test_a_sampler_at_another_temperature_than_the_trainer_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = RolloutEngine.generate

    def hot(self: RolloutEngine, prompts: list[Prompt], group_size: int, sampling: Sampling, **others: Any) -> list[Rollout]:
        is_training = sampling.purpose is Purpose.ROLLOUT and sampling.step > 0
        return right(self, prompts, group_size, replace(sampling, temperature=2.0) if is_training else sampling, **others)

    monkeypatch.setattr(RolloutEngine, "generate", hot)
    assert the_warning(run(tmp_path / "run", early_letters, max_steps=10), "sampler_mismatch")["sampler_mismatch_kl"] > 0.01


# And healthy runs, which report every metric that a rule reads, have none.


def test_a_healthy_run_of_grpo_and_one_of_ppo_hear_nothing(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"max_steps": 25, "kl_coefficient": 0.1, "learning_rate": 2e-4, "valid_rows": 4, "eval_interval": 5}

    def known_by_the_prompt(request: GradeRequest) -> float:
        return (early_letters(request) + (request.item["letter"] < "e")) / 2

    grpo = run(tmp_path / "grpo", early_letters, **shared)
    ppo = run(
        tmp_path / "ppo",
        known_by_the_prompt,
        **shared,
        algorithm="ppo",
        batch_size=8,
        group_size=2,
        value_learning_rate=3e-3,
        max_grad_norm=10.0,
    )
    assert warnings(grpo) == warnings(ppo) == []
    assert all(line.values.keys() >= set(REMEMBERED) for line in read_metrics(ppo))
    rewards = [line.values["reward_mean"] for line in read_metrics(grpo)]
    assert statistics.fmean(rewards[-5:]) > statistics.fmean(rewards[:5]) + 0.1


# Thresholds, on histories made by hand.


def diagnose(steps: list[dict[str, float]], valid: dict[int, dict[str, float]] | None = None, **options: Any) -> list[tuple[int, Finding]]:
    """(step, finding) of a run with these metrics, from step 1."""
    state, found = DoctorState(), []
    for step, train in enumerate(steps, start=1):
        state, findings = examine(state, Options(**options), step, train, (valid or {}).get(step, {}))
        found += [(step, finding) for finding in findings]
    return found


def rules_of(found: list[tuple[int, Finding]]) -> list[str]:
    return sorted({finding.rule for _, finding in found})


BORDERS = [
    ("no_signal", {"zero_variance_group_fraction": 0.5}, {"zero_variance_group_fraction": 0.49}),
    ("no_signal", {"reward_std": 0.0}, {"reward_std": 1e-9}),
    ("entropy_collapse", {"entropy": 0.4}, {"entropy": 0.41}),
    ("clip_saturation", {"clip_fraction": 0.3}, {"clip_fraction": 0.29}),
    ("critic_explains_nothing", {"explained_variance": 0.05}, {"explained_variance": 0.06}),
    ("critic_explains_nothing", {"explained_variance": -40.0}, {"explained_variance": 0.06}),
    (
        "length_explosion",
        {"completion_tokens_mean": 200.0, "truncated_fraction": 0.2},
        {"completion_tokens_mean": 199.0, "truncated_fraction": 0.9},
    ),
    (
        "length_explosion",
        {"completion_tokens_mean": 900.0, "truncated_fraction": 0.9},
        {"completion_tokens_mean": 900.0, "truncated_fraction": 0.19},
    ),
    ("reward_falling", {"reward_mean": 0.29}, {"reward_mean": 0.31}),
    ("truncated_completions", {"truncated_fraction": 0.95}, {"truncated_fraction": 0.94}),
    ("grader_failures", {"grader_failure_fraction": 0.11}, {"grader_failure_fraction": 0.1}),
    ("gradient_clipped", {"grad_norm": 100.0}, {"grad_norm": 99.0}),
    ("sampler_mismatch", {"sampler_mismatch_kl": 0.01}, {"sampler_mismatch_kl": 0.009}),
]
"""Rule, metrics after the first steps that make it true, metrics that just do not."""


@pytest.mark.parametrize(("rule", "sick", "well"), BORDERS)
def test_a_rule_is_true_from_its_threshold_on_and_for_a_whole_window(rule: str, sick: dict[str, float], well: dict[str, float]) -> None:
    first = [CALM] * 3
    assert rules_of(diagnose([*first, *[CALM | well] * 40])) == []
    found = diagnose([*first, *[CALM | sick] * 40])
    assert rules_of(found) == [rule]
    assert found[0][0] >= WINDOW
    single = [*[CALM] * 12, CALM | sick, *[CALM] * 30]
    assert rules_of(diagnose(single)) == []


def test_kl_must_be_large_and_grow() -> None:
    def after(before: float, now: float) -> list[str]:
        return rules_of(diagnose([*[CALM | {"kl_reference": before}] * 10, *[CALM | {"kl_reference": now}] * 10]))

    assert after(0.2, 0.3) == ["kl_growing"]
    assert after(0.2, 0.299) == []
    assert after(1.0, 1.101) == ["kl_growing"]
    assert after(1.0, 1.099) == []


def test_the_median_of_the_explained_variance_bears_single_steps_that_are_far_off() -> None:
    noisy = [CALM | {"explained_variance": -9.0 if step % 3 == 0 else 0.2} for step in range(40)]
    assert rules_of(diagnose(noisy)) == []


def test_a_value_model_is_not_blamed_where_there_is_nothing_to_explain() -> None:
    assert rules_of(diagnose([CALM | {"explained_variance": 0.0, "reward_std": 0.0}] * 30)) == ["no_signal"]


def test_limits_are_those_of_the_options() -> None:
    failing, steep = CALM | {"grader_failure_fraction": 0.11}, CALM | {"grad_norm": 150.0}
    assert rules_of(diagnose([failing] * 10, max_grader_failure_fraction=0.3)) == []
    assert rules_of(diagnose([CALM] * 10, max_grader_failure_fraction=0.0)) == ["grader_failures"]
    assert rules_of(diagnose([CALM | {"grader_failure_fraction": 0.0}] * 10, max_grader_failure_fraction=0.0)) == []
    assert rules_of(diagnose([steep] * 10, max_grad_norm=2.0)) == []


@pytest.mark.parametrize(
    ("scores", "rise", "expected"),
    [
        ([0.5, 0.6, 0.49, 0.49], 0.05, ["overfitting"]),
        ([0.5, 0.6, 0.51, 0.49], 0.05, []),
        ([0.5, 0.6, 0.49, 0.51], 0.05, []),
        ([0.5, 0.6, 0.49], 0.05, []),
        ([0.5, 0.6, 0.49, 0.49], 0.03, []),
        ([0.5, 0.6, 0.49, 0.49], -0.1, []),
    ],
)
def test_overfitting_is_two_evaluations_in_a_row_below_the_interval_of_the_best_while_training_goes_up(
    scores: list[float], rise: float, expected: list[str]
) -> None:
    """Half width 0.1, evaluations every ten steps; the training reward of the third and fourth is higher by `rise` (bound: 0.1 * 0.4)."""
    steps = [CALM | {"reward_mean": 0.5 + (rise if step >= 20 else 0.0)} for step in range(10 * len(scores))]
    valid = {10 * (i + 1): {"valid_reward_mean": score, "valid_reward_half_width": 0.1} for i, score in enumerate(scores)}
    assert rules_of(diagnose(steps, valid)) == expected


def test_a_rule_that_stays_true_is_reported_again_only_after_the_cool_down() -> None:
    found = diagnose([CALM | {"clip_fraction": 0.5}] * (2 * COOL_DOWN + WINDOW + 5))
    assert [step for step, _ in found] == [WINDOW, WINDOW + COOL_DOWN, WINDOW + 2 * COOL_DOWN]


def test_a_rule_that_was_over_for_a_while_is_news_and_one_that_flickers_is_not() -> None:
    sick, well = [CALM | {"truncated_fraction": 1.0}] * WINDOW, [CALM]
    flickering = diagnose([CALM | {"truncated_fraction": fraction} for fraction in (*[0.95] * WINDOW, *[0.94, 0.96] * WINDOW)])
    assert [step for step, _ in flickering] == [WINDOW]
    over = diagnose([*sick, *well * RECOVERY, *sick])
    assert [step for step, _ in over] == [WINDOW, 2 * WINDOW + RECOVERY]


def test_metrics_that_are_not_there_silence_their_rules_alone() -> None:
    sick = {name: value for _, metrics, _ in BORDERS for name, value in metrics.items()}
    everything = rules_of(diagnose([*[CALM] * 3, *[CALM | sick] * 30]))
    without = {name: value for name, value in (CALM | sick).items() if name not in ("explained_variance", "entropy")}
    assert set(everything) - set(rules_of(diagnose([*[CALM] * 3, *[without] * 30]))) == {"entropy_collapse"}
    assert diagnose([{}] * 30) == []


def test_the_state_goes_through_json_at_every_step_and_finds_the_same() -> None:
    def noise(step: int, name: str) -> float:
        return hashlib.sha256(f"{step} {name}".encode()).digest()[0] / 255

    steps = [{name: 1.3 * value * noise(step, name) ** 0.2 for name, value in CALM.items()} for step in range(120)]
    for step in range(30, 90):
        steps[step] |= {"clip_fraction": 0.6 * noise(step, "clip"), "entropy": 0.1 * noise(step, "entropy"), "kl_reference": step / 50}
    kept, stored = DoctorState(), Progress()
    reported = []
    for number, train in enumerate(steps, start=1):
        valid = {"valid_reward_mean": 1 - number / 200, "valid_reward_half_width": 0.01} if number % 10 == 0 else {}
        kept, findings = examine(kept, Options(), number, train, valid)
        read = Progress.model_validate(json.loads(stored.model_dump_json()))
        state, same = examine(read.doctor, Options(), number, train, valid)
        stored = read.model_copy(update={"doctor": state})
        assert (state, same) == (kept, findings)
        reported += findings
    assert {finding.rule for finding in reported} >= {"clip_saturation", "entropy_collapse", "kl_growing"}


@pytest.mark.parametrize("stopped_in", [6, 12])
def test_a_resumed_run_reports_what_the_uninterrupted_one_does(tmp_path: Path, stopped_in: int) -> None:
    whole = run(tmp_path / "whole", lambda _: 0.5, max_steps=13)
    parted = make_run_directory(tmp_path / "parted", **TINY, max_steps=13)

    def grade(request: GradeRequest) -> float:
        if request.metadata["step"] == stopped_in:
            write_control(parted, Control.DRAIN)
        return 0.5

    assert train_here(parted, FunctionGrader(grade)).step == stopped_in - 1
    (parted / "control").unlink()
    assert train_here(parted, FunctionGrader(lambda _: 0.5)).end is End.SUCCEEDED
    assert [event["data"] for event in warnings(parted)] == [event["data"] for event in warnings(whole)]
    assert [event["data"]["evidence"]["last_step"] for event in warnings(whole)] == [10]


# What is said.


def test_every_rule_says_one_cause_and_advises_options_that_exist() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert re.fullmatch("[a-z_]+", rule.name)
        assert re.fullmatch(r"[A-Z][^.]+\.", rule.cause)
        advised = re.findall("`([^`]*)`", rule.advice)
        assert advised
        assert set(advised) <= Options.model_fields.keys()


def test_a_number_that_is_not_known_is_no_evidence() -> None:
    ungraded = {name: value for name, value in CALM.items() if not name.startswith("reward_")}
    found = diagnose([*[CALM | {"zero_variance_group_fraction": 1.0}] * 9, ungraded])
    assert [finding.evidence.keys() for _, finding in found] == [{"first_step", "last_step", "zero_variance_group_fraction"}]


def test_numbers_in_an_event_are_in_its_words() -> None:
    ((_, finding),) = diagnose([CALM | {"clip_fraction": 0.5}] * WINDOW)
    assert finding.evidence == {"first_step": 1, "last_step": 10, "clip_fraction": 0.5}
    assert "(first_step 1, last_step 10, clip_fraction 0.5)" in finding.message
    assert finding.message.startswith(finding.cause)
