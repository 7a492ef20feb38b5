"""The table of what goes together, row by row: what a row forbids is refused with both names, what it allows is not."""

from typing import Any

import pytest

from core.compatibility import RULES, Limit, Rule, broken_rules, refusal
from core.errors import InvalidRequest
from core.options import Options
from core.presets import resolve_options

VALUES: dict[str, tuple[Any, ...]] = {
    "advantage_estimator": ("group", "gae", "batch"),
    "value_model": (None, "separate", "shared_backbone"),
    "value_clip": (0.1,),
    "value_learning_rate": (1e-4,),
    "value_warmup_steps": (2,),
    "value_gradient": ("head_only",),
    "value_coefficient": (0.5,),
    "value_gae_lambda": (0.9,),
    "gamma": (0.9,),
    "gae_lambda": (0.9,),
    "whiten_advantages": (False,),
    "truncation_bootstrap": (True,),
    "advantage_scale": ("none", "batch"),
    "advantage_baseline": ("leave_one_out",),
    "dynamic_sampling": (0, 3),
    "group_size": (None, 4, 1),
    "ratio_level": ("token", "sequence"),
    "loss_aggregation": ("token_mean", "sequence_mean", "fixed_length"),
    "clip_dual": (3.0,),
    "surrogate": ("clip", "cispo"),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_placement": ("loss", "reward"),
    "kl_coefficient": (0.0, 0.1),
    "kl_target": (None, 0.5),
    "kl_horizon": (100.0,),
    "mismatch_correction": ("none", "truncate", "reject"),
    "mismatch_cap": (3.0,),
    "finetuning": ("lora", "full"),
    "lora_rank": (4,),
    "lora_alpha": (8.0,),
    "lora_targets": (("q_proj",),),
    "mask_truncated": (False, True),
    "max_staleness": (0, 1),
    "learning_rate": (None, 1e-4),
    "learning_rate_multiplier": (2.0,),
    "compute_multiplier": (0.5,),
    "max_steps": (None, 4),
    "n_epochs": (2,),
}
PAIRS = [rule for rule in RULES if isinstance(rule, Rule)]
LIMITS = [rule for rule in RULES if isinstance(rule, Limit)]


def named(rule: Rule | Limit) -> str:
    return f"{rule.option}-{rule.other}"


@pytest.mark.parametrize("rule", PAIRS, ids=named)
def test_a_row_forbids_exactly_the_pairs_that_it_says(rule: Rule) -> None:
    allowed, forbidden = 0, 0
    for value in rule.values or VALUES[rule.option]:
        for other in VALUES[rule.other]:
            options = Options(**{rule.option: value, rule.other: other})
            is_forbidden = other not in rule.needs if rule.needs else other in rule.refuses
            assert (rule in broken_rules(options, frozenset({rule.option, rule.other}))) == is_forbidden
            allowed, forbidden = allowed + (not is_forbidden), forbidden + is_forbidden
    assert allowed, "a row that forbids everything belongs into the option's own range"
    assert forbidden


@pytest.mark.parametrize("rule", PAIRS, ids=named)
def test_what_a_row_forbids_is_refused_at_submit_and_the_refusal_names_both(rule: Rule) -> None:
    value = rule.values[0] if rule.values else VALUES[rule.option][-1]
    other = next(other for other in VALUES[rule.other] if not rule.allows(other))
    given = {rule.option: value, rule.other: other}
    message = refusal(rule, Options(**given))
    assert message.startswith(f"{rule.option} {value!r} cannot be used with {rule.other} {other!r}")
    context = {"advantage_estimator": "gae"} if rule.other in ("value_model", "mask_truncated") else {}
    with pytest.raises(InvalidRequest) as caught:
        resolve_options("grpo", {**context, **{name: v for name, v in given.items() if v is not None}})
    assert caught.value.code == "incompatible_options"
    assert caught.value.message == message
    assert (caught.value.param or "").split(".")[-1] in given


@pytest.mark.parametrize("rule", [rule for rule in PAIRS if not rule.values], ids=named)
def test_an_option_without_effect_is_refused_only_where_the_request_names_it(rule: Rule) -> None:
    other = next(other for other in VALUES[rule.other] if not rule.allows(other))
    options = Options(**{rule.option: VALUES[rule.option][-1], rule.other: other})
    assert rule not in broken_rules(options, frozenset({rule.other}))


@pytest.mark.parametrize("rule", LIMITS, ids=named)
def test_a_limit_holds_at_its_edge(rule: Limit) -> None:
    for value, is_broken in ((3, False), (4, rule.is_strict), (5, True)):
        options = Options(**{rule.option: value, rule.other: 4})
        assert (rule in broken_rules(options, frozenset())) == is_broken


def test_every_row_stands_once() -> None:
    assert len({(rule.option, rule.other) for rule in RULES}) == len(RULES)
