"""Algorithms as settings: a preset only sets options, and an explicit option overrides it. The one place that knows their names."""

from typing import Any

from pydantic import ValidationError

from core.errors import InvalidRequest
from core.options import BASE_LEARNING_RATE, Options, silenced

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage_scale": "none", "loss_aggregation": "fixed_length", "kl_coefficient": 0.0},
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
    merged = {**_still_meant(PRESETS[algorithm], explicit), **explicit}
    try:
        options = Options(**merged)
    except ValidationError as error:
        raise _as_request_error(error, explicit, merged, prefix) from error
    for name, why in silenced(options, set(explicit)):
        raise InvalidRequest(f"{name} has no effect with {why}.", code="incompatible_options", param=f"{prefix}.{name}")
    return _fill_automatic(options)


def _still_meant(preset: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """The preset without what an explicit option of the request takes the ground from.

    Turning KL off also drops the preset's choice of KL estimator and placement; another estimator drops the preset's
    value model, scale and baseline. Only options that the request itself names can contradict each other.
    """
    dropped: set[str] = set()
    if explicit.get("kl_coefficient") == 0:
        dropped |= {"kl_estimator", "kl_placement"}
    if explicit.get("advantage_estimator", preset.get("advantage_estimator")) != preset.get("advantage_estimator"):
        dropped |= {"value_model", "advantage_scale", "advantage_baseline", "ratio_level"}
    return {name: value for name, value in preset.items() if name not in dropped}


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


def _as_request_error(error: ValidationError, explicit: dict[str, Any], merged: dict[str, Any], prefix: str) -> InvalidRequest:
    """Of two options that contradict each other, the one that the request itself names is the parameter."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        message = str(first["msg"]).removeprefix("Value error, ")
        named = sorted((name for name in Options.model_fields if name in message), key=lambda name: name not in explicit)
        return InvalidRequest(message, code="incompatible_options", param=f"{prefix}.{named[0]}" if named else prefix)
    name = str(first["loc"][0])
    return InvalidRequest(f"'{name}': {first['msg']}; got {merged.get(name)!r}.", param=f"{prefix}.{name}")
