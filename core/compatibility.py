"""Which options go together: one table, from which the refusals at submit, docs/hyperparameters.md and the tests are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.options import Options


@dataclass(frozen=True)
class Rule:
    """`option` goes with some values of `other` only, because "`option` {why}"."""

    option: str
    other: str
    why: str
    values: tuple[Any, ...] = ()
    """The values of `option` that the rule is about. Empty: the option is without effect there, so it is refused where the
    request names it, whatever its value."""

    needs: tuple[Any, ...] = ()
    """`other` must be one of these."""

    refuses: tuple[Any, ...] = ()
    """`other` must be none of these."""

    preset_yields: bool = False
    """Where the request sets `other` so that the rule breaks, a preset's choice of `option` falls away instead of being refused."""

    def is_broken(self, options: Options, named: frozenset[str]) -> bool:
        """`named`: the options that the request itself sets."""
        value = getattr(options, self.option)
        applies = value in self.values if self.values else self.option in named
        return applies and not self.allows(getattr(options, self.other))

    def allows(self, other: Any) -> bool:
        return other in self.needs if self.needs else other not in self.refuses


@dataclass(frozen=True)
class Limit:
    """The number `option` may not be more than the number `other`; None on either side is no limit."""

    option: str
    other: str
    why: str
    is_strict: bool = False
    """Nor as much."""

    def is_broken(self, options: Options, named: frozenset[str]) -> bool:
        value, most = getattr(options, self.option), getattr(options, self.other)
        if value is None or most is None:
            return False
        return bool(value >= most if self.is_strict else value > most)


_VALUE = ("value_clip", "value_learning_rate", "value_warmup_steps", "value_gradient", "value_coefficient", "value_gae_lambda")
_GAE = ("gamma", "gae_lambda", "whiten_advantages", "truncation_bootstrap")
_SHARED = ("value_coefficient", "value_gradient")

RULES: tuple[Rule | Limit, ...] = (
    Rule(
        "value_model",
        "advantage_estimator",
        "needs an estimator that uses values",
        values=("separate", "shared_backbone"),
        needs=("gae",),
        preset_yields=True,
    ),
    *(Rule(name, "advantage_estimator", "concerns the value model, which only this estimator has", needs=("gae",)) for name in _VALUE),
    *(Rule(name, "advantage_estimator", "is a setting of this estimator", needs=("gae",)) for name in _GAE),
    Rule("advantage_scale", "advantage_estimator", "is a setting of this estimator", needs=("group",), preset_yields=True),
    Rule("advantage_baseline", "advantage_estimator", "is a setting of this estimator", needs=("group",), preset_yields=True),
    Rule("dynamic_sampling", "advantage_estimator", "replaces groups that teach nothing", needs=("group",), preset_yields=True),
    Rule("group_size", "advantage_estimator", "of 1 has no signal: there is nothing to compare with", values=(1,), refuses=("group",)),
    Rule(
        "ratio_level",
        "advantage_estimator",
        "needs one advantage per completion",
        values=("sequence",),
        needs=("group",),
        preset_yields=True,
    ),
    Rule("ratio_level", "loss_aggregation", "has one ratio per completion", values=("sequence",), needs=("sequence_mean",)),
    Rule("clip_dual", "surrogate", "bounds the clipped surrogate", needs=("clip",)),
    Rule("kl_estimator", "kl_placement", "has an expected on-policy gradient of zero", values=("k1",), refuses=("loss",)),
    *(
        Rule(name, "kl_coefficient", "has nothing to weigh", refuses=(0.0,), preset_yields=True)
        for name in ("kl_estimator", "kl_placement", "kl_target")
    ),
    Rule("kl_horizon", "kl_target", "is the pace of the adaptive coefficient", refuses=(None,)),
    Rule("mismatch_cap", "mismatch_correction", "bounds the correction", refuses=("none",)),
    *(Rule(name, "value_model", "concerns a backbone that is shared with the policy", refuses=("separate",)) for name in _SHARED),
    *(Rule(name, "finetuning", "describes adapters", needs=("lora",)) for name in ("lora_rank", "lora_alpha", "lora_targets")),
    Rule("truncation_bootstrap", "mask_truncated", "needs truncated completions to count", values=(True,), refuses=(True,)),
    Rule(
        "max_staleness",
        "dynamic_sampling",
        "generates the next batch before the grades say which groups to replace",
        values=(1,),
        needs=(0,),
    ),
    Rule("learning_rate_multiplier", "learning_rate", "scales the automatic rate: give one of them", needs=(None,)),
    Rule("compute_multiplier", "group_size", "scales the automatic size: give one of them", needs=(None,)),
    Rule("n_epochs", "max_steps", "sets the length of the run: give one of them", needs=(None,)),
    Limit("minibatches_per_batch", "batch_size", "deals out whole groups"),
    Limit("value_warmup_steps", "max_steps", "must leave steps in which the policy learns", is_strict=True),
)


def broken_rules(options: Options, named: frozenset[str]) -> list[Rule | Limit]:
    """Every rule that `options` break; `named` are those that the request itself sets."""
    return [rule for rule in RULES if rule.is_broken(options, named)]


def yielding(preset: Mapping[str, Any], given: Mapping[str, Any]) -> frozenset[str]:
    """The options of `preset` that give way to what the request sets itself."""
    return frozenset(
        rule.option
        for rule in RULES
        if isinstance(rule, Rule)
        and rule.preset_yields
        and rule.option in preset
        and rule.option not in given
        and rule.other in given
        and not rule.allows(given[rule.other])
    )


def refusal(rule: Rule | Limit, options: Options) -> str:
    """One sentence with both names, what came and what was wanted."""
    value, other = (getattr(options, name) for name in (rule.option, rule.other))
    return f"{rule.option} {value!r} cannot be used with {rule.other} {other!r}: {rule.option} {rule.why}{_wanted(rule)}."


def _wanted(rule: Rule | Limit) -> str:
    if isinstance(rule, Limit):
        return f"; it must be {'less than' if rule.is_strict else 'at most'} {rule.other}"
    if rule.needs:
        return f"; {rule.other} must be {' or '.join('left out' if value is None else repr(value) for value in rule.needs)}"
    return f"; {rule.other} must not be {' or '.join('left out' if value is None else repr(value) for value in rule.refuses)}"
