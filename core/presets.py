"""Algorithms as settings: a preset only sets options, and an explicit option overrides it. The one place that knows their names."""

from typing import Any

from pydantic import ValidationError

from core.compatibility import broken_rules, refusal, yielding
from core.errors import InvalidRequest
from core.options import BASE_LEARNING_RATE, Options

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage_scale": "none", "loss_aggregation": "fixed_length", "kl_coefficient": 0.0},
    "dapo": {
        "clip_high": 0.28,
        "loss_aggregation": "token_mean",
        "kl_coefficient": 0.0,
        "dynamic_sampling": 4,
        "overlong_penalty": 0.2,
    },
    "gspo": {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coefficient": 0.0},
    "rloo": {
        "advantage_scale": "none",
        "advantage_baseline": "leave_one_out",
        "loss_aggregation": "fixed_length",
        "kl_estimator": "k1",
        "kl_placement": "reward",
    },
    "reinforce_pp": {
        "advantage_estimator": "batch",
        "loss_aggregation": "token_mean",
        "kl_coefficient": 0.01,
        "kl_estimator": "k1",
        "kl_placement": "reward",
    },
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "loss_aggregation": "token_mean", "kl_coefficient": 0.0},
    "ppo": {
        "advantage_estimator": "gae",
        "value_model": "separate",
        "loss_aggregation": "token_mean",
        "kl_estimator": "k1",
        "kl_placement": "reward",
    },
}


def resolve_options(algorithm: str, given: dict[str, Any]) -> Options:
    """The effective options of `algorithm` with what the request names on top ("auto" and null count as not given).

    Raises: InvalidRequest naming the option (or both options) that is wrong.
    """
    if algorithm not in PRESETS:
        raise InvalidRequest(
            f"Unknown algorithm '{algorithm}': one of {', '.join(sorted(PRESETS))}.", param="method.reinforcement.algorithm"
        )
    prefix = "method.reinforcement.hyperparameters"
    explicit = {name: value for name, value in given.items() if value is not None and value != "auto"}
    preset = {name: value for name, value in PRESETS[algorithm].items() if name not in yielding(PRESETS[algorithm], explicit)}
    merged = {**preset, **explicit}
    try:
        options = Options(**merged)
    except ValidationError as error:
        raise _as_request_error(error, merged, prefix) from error
    for rule in broken_rules(options, frozenset(explicit)):
        param = rule.option if rule.option in explicit else rule.other
        raise InvalidRequest(refusal(rule, options), code="incompatible_options", param=f"{prefix}.{param}")
    return _fill_automatic(options)


def _fill_automatic(options: Options) -> Options:
    """Options with the automatic group size, learning rates and value model filled in."""
    is_gae = options.advantage_estimator == "gae"
    filled: dict[str, Any] = {}
    if options.group_size is None:
        filled["group_size"] = max(1, round(options.compute_multiplier)) if is_gae else max(2, round(8 * options.compute_multiplier))
    if is_gae and options.value_model is None:
        filled["value_model"] = "separate"
    rate = options.learning_rate or BASE_LEARNING_RATE[options.finetuning] * options.learning_rate_multiplier
    filled["learning_rate"] = rate
    if is_gae and options.value_learning_rate is None:
        value_model = filled.get("value_model", options.value_model)
        filled["value_learning_rate"] = rate * 10 if value_model == "separate" else rate
    return options.model_copy(update=filled)


def _as_request_error(error: ValidationError, merged: dict[str, Any], prefix: str) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    return InvalidRequest(f"'{name}': {first['msg']}; got {merged.get(name)!r}.", param=f"{prefix}.{name}")
