"""Attention of new tokens over the cache or a prompt: windows as masks, soft caps, several query heads per key head."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainer.engine_families import Attention


def causal_mask(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """[width, width] bool, True where a query may see a key; None where every key up to the query is seen."""
    if window is None or window >= width:
        return None
    return torch.ones(width, width, dtype=torch.bool, device=device).tril().triu(1 - window)


def step_mask(positions: Tensor, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What tokens at `positions` [b] see of the first `width` keys. -> [b, 1, 1, width], 0 or -inf."""
    keys = torch.arange(width, device=positions.device)
    is_seen = keys <= positions[:, None]
    if window is not None:
        is_seen &= keys > positions[:, None] - window
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=positions.device).masked_fill_(~is_seen, -math.inf)
    return mask[:, None, None]


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
    """[b, heads, n, d], [b, kv heads, w, d] twice -> [b, heads, n, d]. `mask` broadcasts to [b, heads, n, w]; None: causal."""
    if attention.soft_cap is None:
        shaped = mask if mask is None or mask.dim() == 2 else mask.expand(len(query), 1, query.shape[2], -1)
        return functional.scaled_dot_product_attention(
            query, keys, values, shaped, is_causal=mask is None, scale=attention.scale, enable_gqa=query.shape[1] != keys.shape[1]
        )
    repeats = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = query.float() @ keys.float().transpose(-1, -2) * (attention.scale / attention.soft_cap)
    scores = scores.tanh_().mul_(attention.soft_cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(values.dtype) @ values
