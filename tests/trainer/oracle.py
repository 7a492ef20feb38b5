"""What one update should do to the weights, said a second time: loops over rows and tokens in float64, from the model's whole logits.

Shares no code with the trainer's formulas. It reads the options, what is recorded in a batch, and the weights.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from core.options import Options
from trainer.batch import Batch


def widen(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: the library's norms compute in float32 whatever the weights are."""
    model.double()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                exact = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                exact.weight = child.weight
                setattr(parent, name, exact)
    return model


@dataclass
class Row:
    """One completion. Lists hold one number for each of its counted tokens, in order."""

    group: int
    grade: float
    end_value: float
    """V after the last token; where it is not 0 there is no grade."""

    old: list[float]
    sampling: list[float]
    old_values: list[float]
    reference: list[float]
    logprobs: list[Tensor]
    entropies: list[Tensor]
    values: list[Tensor]
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


@dataclass
class Verdict:
    gradients: dict[str, Tensor]
    """By the names of `Policy.trainable_state`; 0 where the loss does not depend on it."""

    metrics: dict[str, float]
    """Of the step, by their own names."""


class Oracle:
    def __init__(self, folder: Path, options: Options, kl_coefficient: float) -> None:
        self._model = widen(AutoModelForCausalLM.from_pretrained(folder))
        self._options, self._kl_coefficient = options, kl_coefficient

    def judge(self, state: dict[str, Tensor], batch: Batch) -> Verdict:
        """The loss of all of `batch` as one minibatch, with the trainable weights `state`, and its gradients."""
        leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in state.items()}
        rows = [self._row(leaves, batch, row) for row in range(len(batch.groups)) if batch.counts[row] and batch.completion_mask[row].any()]
        counted = self._estimate(rows)
        policy_loss, value_loss = self._policy_loss(counted), self._value_loss(counted)
        weight = self._options.value_coefficient if self._options.value_model == "shared_backbone" else 1.0
        loss = policy_loss + weight * value_loss
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients = dict(zip(leaves, found, strict=True))
        losses = {"loss": float(loss), "policy_loss": float(policy_loss)}
        return Verdict(gradients, losses | self._metrics(counted, gradients) | self._value_metrics(counted, gradients, float(value_loss)))

    # What the models say.

    def _row(self, leaves: dict[str, Tensor], batch: Batch, row: int) -> Row:
        places = [t for t, counts in enumerate(batch.completion_mask[row].tolist()) if counts]
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        ids = torch.cat([prompt, batch.completion_ids[row, : places[-1] + 1]])
        before = [len(prompt) + t - 1 for t in places]
        logits, hidden = self._run(self._weights(leaves, "policy", "default"), ids)
        base, _ = self._run({}, ids)
        goes_on = self._options.truncation_bootstrap and bool(batch.truncated[row])

        def distribution(logits: Tensor, place: int) -> Tensor:
            return (logits[place] / self._options.temperature).log_softmax(0)

        def recorded(tensor: Tensor | None) -> list[float]:
            return [] if tensor is None else [float(tensor[row, t]) for t in places]

        return Row(
            group=int(batch.groups[row]),
            grade=0.0 if goes_on else float(batch.rewards[row]),
            end_value=float(batch.bootstrap_values[row]) if goes_on and batch.bootstrap_values is not None else 0.0,
            old=recorded(batch.old_logprobs),
            sampling=recorded(batch.sampling_logprobs),
            old_values=recorded(batch.values),
            reference=[float(distribution(base, place)[ids[place + 1]]) for place in before],
            logprobs=[distribution(logits, place)[ids[place + 1]] for place in before],
            entropies=[-(distribution(logits, place).exp() * distribution(logits, place)).sum() for place in before],
            values=self._values(leaves, ids, hidden, before) if self._options.needs_values else [],
        )

    def _run(self, weights: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and last hidden states of one sequence."""
        out = functional_call(self._model, weights, kwargs={"input_ids": ids[None], "use_cache": False, "output_hidden_states": True})
        return out.logits[0], out.hidden_states[-1][0]

    def _weights(self, leaves: dict[str, Tensor], owner: str, adapter: str) -> dict[str, Tensor]:
        """Weights by their names in the plain model: the leaves themselves, or base + alpha / rank * B @ A."""
        if self._options.finetuning == "full":
            return {name.removeprefix(f"{owner}."): leaf for name, leaf in leaves.items() if name.startswith(f"{owner}.")}
        base, found = dict(self._model.named_parameters()), {}
        for name, a in leaves.items():
            if name.startswith(owner) and name.endswith(f".lora_A.{adapter}.weight"):
                plain = name.split("base_model.model.")[1].split(".lora_A")[0] + ".weight"
                b = leaves[name.replace("lora_A", "lora_B")]
                found[plain] = base[plain].detach() + self._options.lora_alpha / self._options.lora_rank * b @ a
        return found

    def _values(self, leaves: dict[str, Tensor], ids: Tensor, policy_hidden: Tensor, states: list[int]) -> list[Tensor]:
        hidden = policy_hidden.detach() if self._options.value_gradient == "head_only" else policy_hidden
        if self._options.value_model == "separate":
            weights = self._weights(leaves, "value.backbone", "value")
            if self._options.finetuning == "full":
                weights = {f"model.{name}": leaf for name, leaf in weights.items()}
            _, hidden = self._run(weights, ids)
        return [hidden[state] @ leaves["value.head.weight"] + leaves["value.head.bias"] for state in states]

    # Advantages, in plain numbers.

    def _kl(self, logprob: Tensor, reference: float) -> Tensor:
        difference = logprob - reference
        return {"k1": difference, "k2": difference**2 / 2, "k3": torch.exp(-difference) - 1 + difference}[self._options.kl_estimator]

    def _penalties(self, row: Row) -> list[float]:
        if not self._options.needs_reference or self._options.kl_placement == "loss":
            return [0.0] * len(row.old)
        old = torch.tensor(row.old, dtype=torch.float64)
        return [self._kl_coefficient * float(self._kl(o, reference)) for o, reference in zip(old, row.reference, strict=True)]

    def _estimate(self, rows: list[Row]) -> list[Row]:
        """The rows that enter the loss, with their advantages (and returns)."""
        return {"gae": self._gae, "group": self._group, "batch": self._batch}[self._options.advantage_estimator](rows)

    def _gae(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            rewards = [-penalty for penalty in self._penalties(row)]
            rewards[-1] += row.grade
            values = [*row.old_values, row.end_value]
            deltas = [r + self._options.gamma * values[i + 1] - values[i] for i, r in enumerate(rewards)]
            row.advantages = _discounted_sums(deltas, self._options.gamma * self._options.gae_lambda)
            targets = _discounted_sums(deltas, self._options.gamma * self._options.value_gae_lambda)
            row.returns = [target + value for target, value in zip(targets, row.old_values, strict=True)]
        if self._options.whiten_advantages:
            _whiten(rows)
        return rows

    def _batch(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            row.advantages = [row.grade - ahead for ahead in _discounted_sums(self._penalties(row), 1.0)]
        _whiten(rows)
        return rows

    def _group(self, rows: list[Row]) -> list[Row]:
        groups = [[row for row in rows if row.group == number] for number in sorted({row.group for row in rows})]
        groups = [group for group in groups if len(group) >= 2]
        rewards = [[row.grade - sum(self._penalties(row)) for row in group] for group in groups]
        everywhere = statistics.stdev([r - statistics.fmean(own) for own in rewards for r in own])
        for group, own in zip(groups, rewards, strict=True):
            scale = {"group": statistics.stdev(own) + 1e-4, "batch": everywhere + 1e-4, "none": 1.0}[self._options.advantage_scale]
            for i, row in enumerate(group):
                others = own[:i] + own[i + 1 :] if self._options.advantage_baseline == "leave_one_out" else own
                advantage = 0.0 if max(own) == min(own) else (own[i] - statistics.fmean(others)) / scale
                row.advantages = [advantage] * len(row.old)
        return [row for group in groups for row in group]

    # The loss.

    def _policy_loss(self, rows: list[Row]) -> Tensor:
        per_row = [self._policy_terms(row) for row in rows]
        if self._options.loss_aggregation == "sequence_mean":
            return torch.stack([torch.stack(terms).mean() for terms in per_row]).mean()
        tokens = sum(len(terms) for terms in per_row)
        count = tokens if self._options.loss_aggregation == "token_mean" else len(rows) * self._options.max_completion_tokens
        return torch.stack([term for terms in per_row for term in terms]).sum() / count

    def _policy_terms(self, row: Row) -> list[Tensor]:
        """Surrogate, KL and entropy of each token."""
        options = self._options
        terms: list[Tensor] = []
        weights = self._mismatch_weights(row)
        for i, ratio in enumerate(self._ratios(row)):
            term = weights[i] * self._surrogate(ratio, row.advantages[i], row.logprobs[i])
            if options.needs_reference and options.kl_placement == "loss":
                term = term + self._kl_coefficient * self._kl(row.logprobs[i], row.reference[i])
            terms.append(term - options.entropy_coefficient * row.entropies[i])
        return terms

    def _ratios(self, row: Row) -> list[Tensor]:
        log_ratios = [logprob - old for logprob, old in zip(row.logprobs, row.old, strict=True)]
        if self._options.ratio_level == "sequence":
            log_ratios = [torch.stack(log_ratios).mean()] * len(log_ratios)
        return [log_ratio.exp() for log_ratio in log_ratios]

    def _surrogate(self, ratio: Tensor, advantage: float, logprob: Tensor) -> Tensor:
        """A good token's ratio is bounded from above; a bad one's from below, and from above by the dual clip."""
        least, most = self._bounds(advantage)
        bounded = min(max(float(ratio), least), most)
        if self._options.surrogate == "cispo":
            return -bounded * advantage * logprob
        return -advantage * (ratio if float(ratio) == bounded else torch.tensor(bounded, dtype=torch.float64))

    def _bounds(self, advantage: float) -> tuple[float, float]:
        """Between them the ratio has a gradient, or with CISPO its own weight."""
        low, high = 1 - self._options.clip_low, 1 + self._options.clip_high
        if self._options.surrogate == "cispo":
            return low, high
        return (0.0, high) if advantage >= 0 else (low, self._options.clip_dual or math.inf)

    def _mismatch_weights(self, row: Row) -> list[float]:
        options = self._options
        differences = [old - sampling for old, sampling in zip(row.old, row.sampling, strict=True)]
        of_sequence = math.exp(statistics.fmean(differences))
        if options.mismatch_correction == "none":
            return [1.0] * len(differences)
        if options.mismatch_correction == "reject":
            return [1.0 if 1 / options.mismatch_cap <= of_sequence <= options.mismatch_cap else 0.0] * len(differences)
        if options.ratio_level == "sequence":
            return [min(of_sequence, options.mismatch_cap)] * len(differences)
        return [min(math.exp(difference), options.mismatch_cap) for difference in differences]

    def _value_loss(self, rows: list[Row]) -> Tensor:
        """Mean over tokens of half the larger squared error."""
        terms = []
        for row in rows if self._options.needs_values else []:
            for value, recorded, target in zip(row.values, row.old_values, row.returns, strict=True):
                errors = [(value - target) ** 2]
                clip = self._options.value_clip
                if clip is not None and abs(float(value) - recorded) > clip:
                    bounded = recorded + math.copysign(clip, float(value) - recorded)
                    errors.append(torch.tensor((bounded - target) ** 2, dtype=torch.float64))
                terms.append(max(errors, key=float) / 2)
        return torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64)

    # What is reported: each a mean over all counted tokens.

    def _metrics(self, rows: list[Row], gradients: dict[str, Tensor]) -> dict[str, float]:
        ratios = [(float(ratio), a) for row in rows for ratio, a in zip(self._ratios(row), row.advantages, strict=True)]
        clippable = [(ratio, a) for ratio, a in ratios if a != 0 or self._options.surrogate == "cispo"]
        is_clipped = [ratio > self._bounds(a)[1] or ratio < self._bounds(a)[0] for ratio, a in clippable]
        found = {
            "clip_fraction": sum(is_clipped) / len(ratios),
            "ratio_max": max(ratio for ratio, _ in ratios),
            "entropy": statistics.fmean(float(entropy) for row in rows for entropy in row.entropies),
            "sampler_mismatch_kl": statistics.fmean(_k3(p, q) for row in rows for p, q in zip(row.sampling, row.old, strict=True)),
            "grad_norm": _norm(gradients, "" if self._options.value_model == "shared_backbone" else "policy."),
        }
        if self._options.needs_reference:
            pairs = [pair for row in rows for pair in zip(row.logprobs, row.reference, strict=True)]
            found["kl_reference"] = statistics.fmean(_k3(float(p), q) for p, q in pairs)
        return found

    def _value_metrics(self, rows: list[Row], gradients: dict[str, Tensor], value_loss: float) -> dict[str, float]:
        if not self._options.needs_values:
            return {}
        returns = [target for row in rows for target in row.returns]
        errors = [target - value for row in rows for target, value in zip(row.returns, row.old_values, strict=True)]
        explained = 1 - statistics.pvariance(errors) / statistics.pvariance(returns)
        return {"value_loss": value_loss, "value_grad_norm": _norm(gradients, "value."), "explained_variance": explained}


def _k3(p: float, q: float) -> float:
    """From the log-probs of a token under both."""
    return math.exp(q - p) - 1 - (q - p)


def _norm(gradients: dict[str, Tensor], owner: str) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for name, gradient in gradients.items() if name.startswith(owner)))


def _discounted_sums(numbers: list[float], factor: float) -> list[float]:
    """Of each number and all behind it, each further one times `factor`."""
    return [sum(factor ** (j - i) * numbers[j] for j in range(i, len(numbers))) for i in range(len(numbers))]


def _whiten(rows: list[Row]) -> None:
    everything = [advantage for row in rows for advantage in row.advantages]
    mean, deviation = statistics.fmean(everything), statistics.pstdev(everything)
    for row in rows:
        row.advantages = [(advantage - mean) / (deviation + 1e-8) for advantage in row.advantages]
