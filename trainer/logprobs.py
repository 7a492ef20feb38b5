"""Log-probs and entropies of tokens from hidden states, without the [N, V] tensor of logits: one chunk of it lives at a time.

The backward pass computes each chunk again. The softmax is in float32 or wider; the head's gradient accumulates in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MAX_CHUNK_LOGITS = 2**24
"""Logits computed at once: 64 MiB in float32."""


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


def score_tokens(hidden: Tensor, head: Head, targets: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log-probs of `targets`, entropies in nats) under softmax(logits / temperature). [N, H], [N] -> [N], [N]; both differentiable.

    `dtype` is that of the product with the head.
    """
    logprobs, entropies = _ScoreTokens.apply(hidden, head.weight, head.bias, targets, head, temperature, dtype)
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
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.temperature, ctx.dtype = head, temperature, dtype
        ctx.set_materialize_grads(False)
        working = Head(weight.to(dtype), bias, head.scale, head.soft_cap)
        logprobs, entropies = [], []
        for chunk in _chunks(hidden, weight):
            part, target = hidden[chunk], targets[chunk]
            scaled = working.logits(part, dtype).div_(temperature)
            normaliser = scaled.logsumexp(-1)
            logprobs.append(scaled.gather(1, target[:, None])[:, 0] - normaliser)
            probabilities = scaled.sub(normaliser[:, None]).exp_()
            entropies.append(normaliser - torch.einsum("nv,nv->n", probabilities, scaled))
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, weight, bias, targets = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        working = Head(weight.to(ctx.dtype), bias, ctx.head.scale, ctx.head.soft_cap)
        hidden_gradient = torch.empty_like(hidden)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        wide = _wide_dtype(weight.dtype)
        weight_gradient = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for chunk in _chunks(hidden, weight):
            part = hidden[chunk]
            parts = [None if whole is None else whole[chunk] for whole in (of_logprobs, of_entropies)]
            delta = _logits_gradient(working, part, targets[chunk], parts, ctx.temperature, ctx.dtype)
            narrow = delta.to(ctx.dtype)
            hidden_gradient[chunk] = narrow @ working.weight
            if weight_gradient is not None:
                weight_gradient.add_(narrow.t() @ part.to(ctx.dtype))
            if bias_gradient is not None:
                bias_gradient.add_(delta.sum(0))
        return hidden_gradient, _as(weight_gradient, weight), _as(bias_gradient, bias), None, None, None, None


def _logits_gradient(
    head: Head, hidden: Tensor, targets: Tensor, gradients: list[Tensor | None], temperature: float, dtype: torch.dtype
) -> Tensor:
    """d loss / d(hidden @ weight.T + bias) of one chunk. With p = softmax: d logprob = onehot - p, d entropy = -p * (log p + entropy)."""
    of_logprobs, of_entropies = gradients
    logits = head.logits(hidden, dtype)
    log_p = (logits / temperature).log_softmax(-1)
    p = log_p.exp()
    delta = torch.zeros_like(p)
    if of_logprobs is not None:
        delta.addcmul_(p, of_logprobs[:, None], value=-1.0)
        delta.scatter_add_(1, targets[:, None], of_logprobs[:, None].to(p.dtype))
    if of_entropies is not None:
        entropies = -torch.einsum("nv,nv->n", p, log_p)
        delta.addcmul_(p.mul_(log_p.add_(entropies[:, None])), of_entropies[:, None], value=-1.0)
    return head.finish_gradient(delta.div_(temperature), logits)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, MAX_CHUNK_LOGITS // len(weight))
    return [slice(start, start + size) for start in range(0, max(1, len(hidden)), size)]


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)
