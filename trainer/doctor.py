"""The run doctor: plain rules over a run's metrics that say what goes wrong, by which numbers, and which option to change.

Pure: no files, no clock, no tensors. All that it remembers is a `DoctorState`, which is part of every resume point.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from core.options import Options
from trainer.history import WINDOW, FrozenModel, History

COOL_DOWN = 50
"""Steps after which a rule that is still true is reported again: a long run's log must not forget it, nor be filled by it."""

RECOVERY = WINDOW
"""Steps in a row without it after which a rule is over, and news when it comes back: a mean near a threshold crosses it often."""

SILENT_GROUPS = 0.5
"""Of the groups. From here on most of the completions are paid for and teach nothing."""

COLLAPSED_ENTROPY = 0.2
"""Of the first steps' entropy. When 73 % of it was gone, 76 % of what a run would ever gain was had (Cui et al. 2025, arXiv:2505.22617)."""

SATURATED_CLIP = 0.3
"""Of the counted tokens, over all passes. Token ratios clip a few in a thousand. Sequence ratios clip two orders of magnitude more and
still learn (Zheng et al. 2025, GSPO, arXiv:2507.18071 section 5.2), so the line lies above both."""

LARGE_KL = 0.3
"""Nats per token: the policy finds its tokens e^0.3 = 1.35 times as likely as the reference does, a thousandfold after 23 tokens."""

KL_GROWTH = 1.1
"""Of the window before: a tenth in ten steps is more than the scatter of a mean over ten steps."""

EXPLAINS_NOTHING = 0.05
"""Explained variance. A value model that always answers the mean has 0; one that helps gets to tenths."""

LENGTH_GROWTH = 2.0
"""Of the first steps' length. Together with HITS_LIMIT: longer answers alone are often what was to be learned."""

HITS_LIMIT = 0.2
"""Of the completions are cut: growth that the limit stops, rather than the end of an answer."""

ALL_TRUNCATED = 0.95
"""Of the completions. Grades of answers without an end say little, and nothing teaches the policy to end."""

FAILURES_NEAR_LIMIT = 0.5
"""Of `max_grader_failure_fraction`: on average half of what pauses the job, so that one bad step can."""

GRADIENT_EXCESS = 100.0
"""Times `max_grad_norm`, in every step of the window. Adam undoes a constant factor, so ten times is no harm; a hundred times says that
rewards or losses have another scale than the options were chosen for."""

LARGE_MISMATCH = 0.01
"""Nats per token. k3 is about half the squared difference: what a mean difference of 0.05, the most that bf16 may have, makes is 0.002."""

REWARD_FALL = 0.5
"""Standard deviations of single grades. Means over the first steps and over a window scatter by one or two tenths of one."""

TRAIN_RISE = 0.1
"""Standard deviations of single grades: about two standard errors between two windows of ten steps of 64 completions."""


class Report(FrozenModel):
    """Where a rule stands that was reported and is not over."""

    reported_step: int
    last_true_step: int


class DoctorState(FrozenModel):
    """What the doctor remembers. Goes through JSON without losing a bit."""

    history: History = History()
    reports: dict[str, Report] = Field(default_factory=dict)
    """By rule."""


Evidence = dict[str, float]
Check = Callable[[History, Options], Evidence | None]


@dataclass(frozen=True)
class Rule:
    """One way in which runs go wrong."""

    name: str
    cause: str
    """One sentence."""

    when: str
    """The condition of `check` in words, for the documentation."""

    advice: str
    """What to change. Options stand in backticks, and nothing else does."""

    check: Check
    """The numbers that make the rule true, or None. Where `first_step` is not among them, they are from the newest window."""


@dataclass(frozen=True)
class Finding:
    """A rule that is true, with its numbers and the steps that they are from (`first_step` to `last_step`)."""

    rule: str
    cause: str
    evidence: Evidence
    advice: str

    @property
    def message(self) -> str:
        numbers = ", ".join(f"{name} {value:g}" for name, value in self.evidence.items())
        return f"{self.cause} ({numbers}) {self.advice}"


def examine(
    state: DoctorState, options: Options, step: int, train: dict[str, float], valid: dict[str, float]
) -> tuple[DoctorState, list[Finding]]:
    """What is news after step `step`. `train` and `valid` are its metrics: none before the first step, none without an evaluation."""
    seen = state.history.after(step, train, valid)
    findings: list[Finding] = []
    reports: dict[str, Report] = {}
    for rule in RULES:
        evidence, before = rule.check(seen, options), state.reports.get(rule.name)
        if evidence is None:
            if before is not None and step - before.last_true_step < RECOVERY:
                reports[rule.name] = before
        elif before is not None and step - before.reported_step < COOL_DOWN:
            reports[rule.name] = Report(reported_step=before.reported_step, last_true_step=step)
        else:
            known = {name: value for name, value in evidence.items() if math.isfinite(value)}
            findings.append(Finding(rule.name, rule.cause, {**seen.window_steps(), **known}, rule.advice))
            reports[rule.name] = Report(reported_step=step, last_true_step=step)
    return DoctorState(history=seen, reports=reports), findings


def _no_signal(seen: History, options: Options) -> Evidence | None:
    silent, deviation = seen.mean("zero_variance_group_fraction"), seen.mean("reward_std")
    if silent >= SILENT_GROUPS or deviation == 0.0:
        return {"zero_variance_group_fraction": silent, "reward_mean": seen.mean("reward_mean"), "reward_std": deviation}
    return None


def _entropy_collapse(seen: History, options: Options) -> Evidence | None:
    entropy, first = seen.mean("entropy"), seen.first_mean("entropy")
    return {"entropy": entropy, "first_entropy": first} if entropy <= COLLAPSED_ENTROPY * first else None


def _clip_saturation(seen: History, options: Options) -> Evidence | None:
    clipped = seen.mean("clip_fraction")
    return {"clip_fraction": clipped} if clipped >= SATURATED_CLIP else None


def _kl_growing(seen: History, options: Options) -> Evidence | None:
    kl, before = seen.mean("kl_reference"), seen.mean_before("kl_reference")
    if kl >= LARGE_KL and kl >= KL_GROWTH * before:
        return {"first_step": seen.recent[0].step, "kl_reference": kl, "kl_reference_before": before}
    return None


def _critic_explains_nothing(seen: History, options: Options) -> Evidence | None:
    """Two windows, because the value model starts at zero. Where grades do not differ there is nothing to explain."""
    explained = seen.median("explained_variance")
    if explained <= EXPLAINS_NOTHING and seen.mean("reward_std") > 0.0:
        return {"first_step": seen.recent[0].step, "explained_variance": explained}
    return None


def _length_explosion(seen: History, options: Options) -> Evidence | None:
    name = "completion_tokens_mean"
    length, first, truncated = seen.mean(name), seen.first_mean(name), seen.mean("truncated_fraction")
    if length >= LENGTH_GROWTH * first and truncated >= HITS_LIMIT:
        return {name: length, f"first_{name}": first, "truncated_fraction": truncated}
    return None


def _overfitting(seen: History, options: Options) -> Evidence | None:
    """The two newest evaluations against the best before them: one alone may be a bad draw."""
    if len(seen.evaluations) < 3:
        return None
    best, (before, now) = max(seen.evaluations[:-2], key=lambda at: at.values["valid_reward_mean"]), seen.evaluations[-2:]
    bound = best.values["valid_reward_mean"] - best.values["valid_reward_half_width"]
    has_fallen = before.values["valid_reward_mean"] < bound and now.values["valid_reward_mean"] < bound
    if has_fallen and now.values["reward_mean"] - best.values["reward_mean"] > TRAIN_RISE * best.values["reward_std"]:
        names = ("reward_mean", "valid_reward_mean")
        steps = {"first_step": best.step, "last_step": now.step}
        return {**steps, **{f"first_{name}": best.values[name] for name in names}, **{name: now.values[name] for name in names}}
    return None


def _reward_falling(seen: History, options: Options) -> Evidence | None:
    reward, first, deviation = seen.mean("reward_mean"), seen.first_mean("reward_mean"), seen.first_mean("reward_std")
    if first - reward > REWARD_FALL * deviation:
        return {"reward_mean": reward, "first_reward_mean": first, "first_reward_std": deviation}
    return None


def _truncated_completions(seen: History, options: Options) -> Evidence | None:
    truncated = seen.mean("truncated_fraction")
    return {"truncated_fraction": truncated} if truncated >= ALL_TRUNCATED else None


def _grader_failures(seen: History, options: Options) -> Evidence | None:
    failed, limit = seen.mean("grader_failure_fraction"), options.max_grader_failure_fraction
    return {"grader_failure_fraction": failed, "max_grader_failure_fraction": limit} if failed > FAILURES_NEAR_LIMIT * limit else None


def _gradient_clipped(seen: History, options: Options) -> Evidence | None:
    least = seen.least("grad_norm")
    return {"least_grad_norm": least, "max_grad_norm": options.max_grad_norm} if least >= GRADIENT_EXCESS * options.max_grad_norm else None


def _sampler_mismatch(seen: History, options: Options) -> Evidence | None:
    mismatch = seen.mean("sampler_mismatch_kl")
    return {"sampler_mismatch_kl": mismatch} if mismatch >= LARGE_MISMATCH else None


RULES: tuple[Rule, ...] = (
    Rule(
        "no_signal",
        cause="In most groups all completions got the same grade, so nothing tells a better one from a worse one.",
        when=f"zero_variance_group_fraction is {SILENT_GROUPS:g} or more, or reward_std is 0 in every step",
        advice="Raise `dynamic_sampling`, `group_size` or `temperature`, leave out prompts that are always or never solved, and check that "
        "the grader tells answers apart. Where reward_mean cannot rise any more the run is done: set `target_reward`.",
        check=_no_signal,
    ),
    Rule(
        "entropy_collapse",
        cause="The policy has become nearly certain of every token, so it hardly tries anything new.",
        when=f"entropy is at most {COLLAPSED_ENTROPY:g} of that of the first steps",
        advice="Lower `learning_rate`, or raise `clip_high`, `entropy_coefficient`, `kl_coefficient` or `temperature`.",
        check=_entropy_collapse,
    ),
    Rule(
        "clip_saturation",
        cause="Much of the batch is clipped and teaches nothing: one step moves the policy further than the clip range.",
        when=f"clip_fraction is {SATURATED_CLIP:g} or more",
        advice="Lower `learning_rate`, `epochs_per_batch` or `minibatches_per_batch`.",
        check=_clip_saturation,
    ),
    Rule(
        "kl_growing",
        cause="The policy is far from the reference model and goes on moving away.",
        when=f"kl_reference is {LARGE_KL:g} or more, and {KL_GROWTH:g} times that of the {WINDOW} steps before, or more",
        advice="Raise `kl_coefficient`, set `kl_target`, or lower `learning_rate`.",
        check=_kl_growing,
    ),
    Rule(
        "critic_explains_nothing",
        cause="The value model foretells returns no better than their mean does, so it takes no noise out of the advantages.",
        when=f"the median of explained_variance over {2 * WINDOW} steps is at most {EXPLAINS_NOTHING:g}, and grades differ",
        advice="Raise `value_learning_rate` or `value_warmup_steps`, and `value_clip` where rewards are much larger than 1.",
        check=_critic_explains_nothing,
    ),
    Rule(
        "length_explosion",
        cause="Completions have become much longer and run into the limit.",
        when=f"completion_tokens_mean is {LENGTH_GROWTH:g} times that of the first steps, or more, and truncated_fraction is "
        f"{HITS_LIMIT:g} or more",
        advice="Raise `overlong_penalty`, check that the grader does not pay for length, and set `loss_aggregation` to token_mean: "
        "sequence_mean spreads the penalty of a long wrong answer over its tokens.",
        check=_length_explosion,
    ),
    Rule(
        "overfitting",
        cause="The reward rises on the training prompts while it falls on the validation file.",
        when="valid_reward_mean was in two evaluations in a row below the best before them by more than its half width, while reward_mean "
        f"rose by more than {TRAIN_RISE:g} of reward_std",
        advice="Lower `n_epochs` or `max_steps`, set `patience`, raise `kl_coefficient`, or add prompts. The best checkpoint is kept.",
        check=_overfitting,
    ),
    Rule(
        "reward_falling",
        cause="The policy scores worse than it did at the start.",
        when=f"reward_mean is below that of the first steps by more than {REWARD_FALL:g} of their reward_std",
        advice="Lower `learning_rate` or `entropy_coefficient`, or raise `kl_coefficient` or `batch_size`.",
        check=_reward_falling,
    ),
    Rule(
        "truncated_completions",
        cause="Nearly every completion is cut off before it ends.",
        when=f"truncated_fraction is {ALL_TRUNCATED:g} or more",
        advice="Raise `max_completion_tokens`, set `stop`, or ask for shorter answers in the prompts.",
        check=_truncated_completions,
    ),
    Rule(
        "grader_failures",
        cause="The grader fails so often that a single bad step will pause the job.",
        when=f"grader_failure_fraction is more than {FAILURES_NEAR_LIMIT:g} of max_grader_failure_fraction",
        advice="Mend the grader or give it more time: the samples show each failure. Raise `max_grader_failure_fraction` only where "
        "failures have nothing to do with how good a completion is.",
        check=_grader_failures,
    ),
    Rule(
        "gradient_clipped",
        cause="The gradient is cut to less than a hundredth in every step: rewards have another scale than the options are made for.",
        when=f"grad_norm is {GRADIENT_EXCESS:g} times max_grad_norm or more in every step",
        advice="Have the grader answer about 0 to 1, set `advantage_scale` to group, or raise `max_grad_norm`. Lower `learning_rate` where "
        "grad_norm grows.",
        check=_gradient_clipped,
    ),
    Rule(
        "sampler_mismatch",
        cause="The sampler and the trainer do not agree on how likely the sampled tokens are.",
        when=f"sampler_mismatch_kl is {LARGE_MISMATCH:g} or more",
        advice="Set `precision` to float32, or `mismatch_correction` to reject with a lower `mismatch_cap`.",
        check=_sampler_mismatch,
    ),
)
"""Each condition is about means over the newest WINDOW steps, unless its words say otherwise."""
