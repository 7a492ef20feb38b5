"""Options and presets: what the contract's automatic values mean, and that no option is refused or ignored silently."""

import pytest

from core.errors import InvalidRequest
from core.options import Options
from core.presets import PRESETS, resolve_options

PREFIX = "method.reinforcement.hyperparameters"


@pytest.mark.parametrize("algorithm", sorted(PRESETS))
def test_every_preset_is_a_legal_set_of_options(algorithm: str) -> None:
    options = resolve_options(algorithm, {})
    assert options.needs_values == (algorithm == "ppo")
    assert options.learning_rate == 2e-5


@pytest.mark.parametrize("algorithm", sorted(PRESETS))
def test_options_survive_their_json_form(algorithm: str) -> None:
    options = resolve_options(algorithm, {"stop": ["END"]})
    assert Options.model_validate_json(options.model_dump_json()) == options


@pytest.mark.parametrize(
    ("algorithm", "compute_multiplier", "group_size"),
    [("grpo", 1.0, 8), ("grpo", 0.5, 4), ("grpo", 0.01, 2), ("ppo", 1.0, 1), ("ppo", 3.0, 3), ("ppo", 0.01, 1)],
)
def test_automatic_group_size_follows_compute_multiplier(algorithm: str, compute_multiplier: float, group_size: int) -> None:
    assert resolve_options(algorithm, {"compute_multiplier": compute_multiplier}).group_size == group_size


def test_learning_rate_is_base_rate_times_multiplier() -> None:
    assert resolve_options("grpo", {"finetuning": "full", "learning_rate_multiplier": 3.0}).learning_rate == pytest.approx(3e-6)
    assert resolve_options("grpo", {"learning_rate": 1e-4}).learning_rate == 1e-4


def test_auto_and_null_count_as_not_given() -> None:
    assert resolve_options("grpo", {"batch_size": "auto", "n_epochs": None}) == resolve_options("grpo", {})


def test_turning_kl_off_takes_the_presets_kl_choices_along() -> None:
    assert resolve_options("ppo", {"kl_coefficient": 0.0}).needs_reference is False


@pytest.mark.parametrize(
    ("algorithm", "given", "param", "other"),
    [
        ("grpo", {"value_model": "separate"}, "value_model", "advantage_estimator"),
        ("grpo", {"value_clip": 0.1}, "value_clip", "advantage_estimator"),
        ("grpo", {"group_size": 1}, "group_size", "advantage_estimator"),
        ("grpo", {"kl_estimator": "k1"}, "kl_estimator", "kl_placement"),
        ("gspo", {"loss_aggregation": "token_mean"}, "ratio_level", "loss_aggregation"),
        ("ppo", {"ratio_level": "sequence", "loss_aggregation": "sequence_mean"}, "ratio_level", "advantage_estimator"),
        ("ppo", {"advantage_scale": "none"}, "advantage_scale", "advantage_estimator"),
        ("ppo", {"value_coefficient": 0.5}, "value_coefficient", "value_model"),
        ("cispo", {"clip_dual": 3.0}, "clip_dual", "surrogate"),
        ("grpo", {"learning_rate": 1e-5, "learning_rate_multiplier": 2.0}, "learning_rate_multiplier", "learning_rate"),
        ("grpo", {"finetuning": "full", "lora_rank": 8}, "lora_rank", "finetuning"),
        ("grpo", {"kl_coefficient": 0.0, "kl_estimator": "k2"}, "kl_estimator", "kl_coefficient"),
        ("grpo", {"mismatch_correction": "none", "mismatch_cap": 3.0}, "mismatch_cap", "mismatch_correction"),
        ("grpo", {"minibatches_per_batch": 9}, "minibatches_per_batch", "batch_size"),
        ("grpo", {"max_steps": 3, "n_epochs": 2}, "n_epochs", "max_steps"),
    ],
)
def test_options_that_cannot_work_together_are_refused_with_both_names(
    algorithm: str, given: dict[str, object], param: str, other: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_options(algorithm, given)
    assert caught.value.code == "incompatible_options"
    assert param in caught.value.message
    assert other in caught.value.message


@pytest.mark.parametrize(
    ("algorithm", "given", "dropped"),
    [
        ("dapo", {"advantage_estimator": "batch"}, {"dynamic_sampling": 0}),
        ("gspo", {"advantage_estimator": "gae"}, {"ratio_level": "token"}),
        ("rloo", {"advantage_estimator": "gae"}, {"advantage_scale": "group", "advantage_baseline": "mean"}),
        ("ppo", {"advantage_estimator": "group"}, {"value_model": None}),
        ("rloo", {"kl_coefficient": 0.0}, {"kl_estimator": "k3", "kl_placement": "loss"}),
    ],
)
def test_what_an_explicit_option_leaves_without_effect_falls_out_of_the_preset(
    algorithm: str, given: dict[str, object], dropped: dict[str, object]
) -> None:
    options = resolve_options(algorithm, given)
    assert {name: getattr(options, name) for name in dropped} == dropped


def test_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"dapo.*grpo"):
        resolve_options("trpo", {})


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("clip_low", 1.5), ("learning_rate", float("nan")), ("n_epochs", 51)])
def test_value_out_of_range_is_refused_with_its_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_options("grpo", {name: value})
    assert caught.value.param == f"{PREFIX}.{name}"
