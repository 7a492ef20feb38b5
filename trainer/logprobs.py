"""Log-probs and entropies of tokens from hidden states, without the [N, V] tensor of logits: one chunk of it lives at a time.

The backward pass computes each chunk again. The softmax is in float32 or wider; the head's gradient accumulates in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.batch import Support

MAX_CHUNK_LOGITS = 2**25
"""Logits computed at once: 128 MiB in float32."""
_NEVER = -1e30
"""The logit of a token outside the support: its probability is exactly 0, and 0 * _NEVER is 0 where infinity would give NaN."""


@dataclass(frozen=True)
class Head:
    """The model's output layer: logits = soft_cap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    """[V, H]."""

    bias: Tensor | None = None
    """[V]."""

    scale: float = 1.0
    soft_cap: float | None = None
    """c * tanh(logits / c)."""

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, H] -> [n, V] in float32 or wider; the product is computed in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.finish(_widen(functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft cap; may work in place."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits = logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits

    def finish_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """d loss / d(hidden @ weight.T + bias) from d loss / d `logits`, in place."""
        if self.soft_cap is not None:
            gradient.mul_(1 - (logits / self.soft_cap) ** 2)
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


def score_tokens(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, dtype: torch.dtype, support: Support | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probs of `targets`, entropies in nats) under softmax(logits / temperature). [N, H], [N] -> [N], [N]; both differentiable.

    `dtype` is that of the product with the head. `support` (N rows): the softmax is over each row's tokens, the target among them.
    """
    logprobs, entropies = _ScoreTokens.apply(hidden, head.weight, head.bias, targets, head, temperature, dtype, support)
    return logprobs, entropies


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        temperature: float,
        dtype: torch.dtype,
        support: Support | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.head, ctx.temperature, ctx.dtype, ctx.support = head, temperature, dtype, support
        ctx.set_materialize_grads(False)
        working = Head(weight.to(dtype), bias, head.scale, head.soft_cap)
        columns = [
            _score_chunk(working, hidden[chunk], targets[chunk], temperature, dtype, _kept(support, chunk, len(weight)))
            for chunk in _chunks(hidden, weight)
        ]
        logprobs, entropies, normalisers = (torch.cat(column) for column in zip(*columns, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, weight, bias, targets, normalisers, entropies = ctx.saved_tensors
        working = Head(weight.to(ctx.dtype), bias, ctx.head.scale, ctx.head.soft_cap)
        hidden_gradient = torch.empty_like(hidden)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        wide = _wide_dtype(weight.dtype)
        weight_gradient = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for chunk in _chunks(hidden, weight):
            part = hidden[chunk]
            parts = [None if whole is None else whole[chunk] for whole in gradients]
            known = (normalisers[chunk], entropies[chunk])
            kept = _kept(ctx.support, chunk, len(weight))
            delta = _logits_gradient(working, working.logits(part, ctx.dtype), targets[chunk], known, parts, ctx.temperature, kept)
            narrow = delta.to(ctx.dtype)
            hidden_gradient[chunk] = narrow @ working.weight
            if weight_gradient is not None:
                weight_gradient.add_(narrow.t() @ part.to(ctx.dtype))
            if bias_gradient is not None:
                bias_gradient.add_(delta.sum(0))
        return hidden_gradient, _as(weight_gradient, weight), _as(bias_gradient, bias), None, None, None, None, None


def _score_chunk(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, log-normalisers), each [n]."""
    scaled = _restrict(_divide(head.logits(hidden, dtype), temperature), kept)
    largest = scaled.amax(-1)
    below = scaled.sub_(largest[:, None])
    weights = below.exp()
    total = weights.sum(-1)
    log_total = total.log()
    entropies = log_total - torch.einsum("nv,nv->n", weights, below) / total
    return below.gather(1, targets[:, None])[:, 0] - log_total, entropies, log_total + largest


def _logits_gradient(
    head: Head,
    logits: Tensor,
    targets: Tensor,
    known: tuple[Tensor, Tensor],
    gradients: list[Tensor | None],
    temperature: float,
    kept: Tensor | None,
) -> Tensor:
    """d loss / d(hidden @ weight.T + bias) of one chunk; `logits` is overwritten.

    With p = softmax: d logprob = onehot - p, d entropy = -p * (log p + entropy).
    """
    normalisers, entropies = known
    of_logprobs, of_entropies = gradients
    capped = logits.clone() if head.soft_cap is not None else logits
    log_p = _restrict(_divide(logits, temperature), kept).sub_(normalisers[:, None])
    if of_entropies is None:
        delta = log_p.exp_()
        if of_logprobs is not None:
            delta.mul_(-of_logprobs[:, None])
    else:
        p = log_p.exp()
        constant = of_entropies * entropies + (0.0 if of_logprobs is None else of_logprobs)
        delta = log_p.mul_(of_entropies[:, None]).add_(constant[:, None]).mul_(p).neg_()
    if of_logprobs is not None:
        delta.scatter_add_(1, targets[:, None], of_logprobs[:, None].to(delta.dtype))
    return head.finish_gradient(_divide(delta, temperature), capped)


def _divide(numbers: Tensor, temperature: float) -> Tensor:
    """In place."""
    return numbers if temperature == 1.0 else numbers.div_(temperature)


def _kept(support: Support | None, chunk: slice, vocabulary: int) -> Tensor | None:
    """[n, V] bool of one chunk's rows."""
    if support is None:
        return None
    return support.select(torch.arange(len(support.lengths), device=support.offsets.device)[chunk]).mask(vocabulary)


def _restrict(scaled: Tensor, kept: Tensor | None) -> Tensor:
    """Tokens that are not in `kept` get no probability; in place."""
    return scaled if kept is None else scaled.masked_fill_(~kept, _NEVER)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, MAX_CHUNK_LOGITS // len(weight))
    return [slice(start, start + size) for start in range(0, max(1, len(hidden)), size)]


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)
