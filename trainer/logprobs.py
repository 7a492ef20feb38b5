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
"""Logits whose gradient is kept at once: 64 MiB in bfloat16."""
_TILE_LOGITS = 2**23
"""Logits that are worked on at once on a CPU, in float32: 32 MiB."""
_WIDENED_ROWS = 2048
"""Rows of the head's gradient that are added at once: adding across types copies them first."""
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
        ctx.temperature, ctx.support = temperature, support
        ctx.set_materialize_grads(False)
        ctx.head = working = Head(weight.to(dtype), None if bias is None else bias.to(dtype), head.scale, head.soft_cap)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        hidden = hidden.to(dtype)
        tiles = _slices(len(hidden), _tile_rows(weight))
        space, product = _Space(working, tiles[0].stop), working.weight.new_empty(tiles[0].stop, len(weight))
        spare = torch.empty_like(product, dtype=_wide_dtype(dtype))
        columns = []
        for tile in tiles:
            rows = slice(0, tile.stop - tile.start)
            scaled = _restrict(_divide(space.logits(hidden[tile], product[rows]), temperature), _kept(support, tile, len(weight)))
            columns.append(_score_tile(scaled, targets[tile], spare[rows]))
        logprobs, entropies, normalisers = (torch.cat(column) for column in zip(*columns, strict=True))
        ctx.save_for_backward(hidden, targets, normalisers, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, targets, normalisers, entropies = ctx.saved_tensors
        weight: Tensor = ctx.head.weight
        hidden_gradient = torch.empty_like(hidden)
        sums = _HeadGradient(ctx.head, *ctx.needs_input_grad[1:3])
        chunks = _slices(len(hidden), max(1, MAX_CHUNK_LOGITS // len(weight)))
        kept_deltas = weight.new_empty(chunks[0].stop, len(weight))
        space = _Space(ctx.head, min(chunks[0].stop, _tile_rows(weight)))
        for chunk in chunks:
            deltas = kept_deltas[: chunk.stop - chunk.start]
            for tile in _slices(len(deltas), space.rows):
                rows = slice(chunk.start + tile.start, chunk.start + tile.stop)
                parts = [None if whole is None else whole[rows] for whole in gradients]
                logits = space.logits(hidden[rows], deltas[tile])
                known, kept = (normalisers[rows], entropies[rows]), _kept(ctx.support, rows, len(weight))
                delta = _logits_gradient(ctx.head, logits, targets[rows], known, parts, ctx.temperature, kept)
                sums.add_bias(delta)
                deltas[tile].copy_(delta)
            torch.mm(deltas, weight, out=hidden_gradient[chunk])
            sums.add_weight(deltas, hidden[chunk])
        of_weight, of_bias = (_as(gradient, dtype) for gradient, dtype in zip((sums.weight, sums.bias), ctx.dtypes, strict=True))
        return hidden_gradient, of_weight, of_bias, None, None, None, None, None


class _Space:
    """Room for the logits of one tile, used for each in turn: to fresh memory of that size, faults cost more than arithmetic."""

    def __init__(self, head: Head, rows: int) -> None:
        self.rows = rows
        self._head = head
        self._wide = torch.empty(rows, len(head.weight), dtype=_wide_dtype(head.weight.dtype), device=head.weight.device)

    def logits(self, hidden: Tensor, product: Tensor) -> Tensor:
        """[n, H] -> [n, V] in float32 or wider, in this space or, where that has the type, in `product` [n, V]; both are overwritten."""
        weight, bias = self._head.weight, self._head.bias
        if bias is None:
            torch.mm(hidden, weight.t(), out=product)
        else:
            torch.addmm(bias, hidden, weight.t(), out=product)
        is_wide = product.dtype == self._wide.dtype
        return self._head.finish(product if is_wide else self._wide[: len(hidden)].copy_(product))


class _HeadGradient:
    """Sums of the head's gradient over chunks, in float32 or wider; None where nobody asks for it."""

    def __init__(self, head: Head, needs_weight: bool, needs_bias: bool) -> None:
        wide = _wide_dtype(head.weight.dtype)
        self.weight = torch.zeros_like(head.weight, dtype=wide) if needs_weight else None
        self.bias = torch.zeros(len(head.weight), dtype=wide, device=head.weight.device) if needs_bias else None
        self._product = torch.empty_like(head.weight) if needs_weight and head.weight.dtype != wide else None

    def add_bias(self, delta: Tensor) -> None:
        if self.bias is not None:
            self.bias.add_(delta.sum(0))

    def add_weight(self, deltas: Tensor, hidden: Tensor) -> None:
        """[n, V], [n, H]."""
        if self.weight is None:
            return
        if self._product is None:
            self.weight.addmm_(deltas.t(), hidden)
            return
        torch.mm(deltas.t(), hidden, out=self._product)
        for rows in _slices(len(self.weight), _WIDENED_ROWS):
            self.weight[rows].add_(self._product[rows])


def _score_tile(scaled: Tensor, targets: Tensor, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, log-normalisers), each [n], of logits [n, V]; these and `spare` [n, V] are overwritten."""
    largest = scaled.amax(-1)
    below = scaled.sub_(largest[:, None])
    weights = torch.exp(below, out=spare)
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


def _tile_rows(weight: Tensor) -> int:
    """On a GPU one tile is one chunk: there small products cost more than memory."""
    return max(1, min(MAX_CHUNK_LOGITS, _TILE_LOGITS if weight.device.type == "cpu" else MAX_CHUNK_LOGITS) // len(weight))


def _slices(length: int, size: int) -> list[slice]:
    """Of `size` each, the last one shorter; one slice at least."""
    return [slice(start, min(start + size, length)) for start in range(0, max(1, length), size)]


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _as(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if gradient is None or dtype is None else gradient.to(dtype)
