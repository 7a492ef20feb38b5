"""Attention over packed rows, put into the library's models through its own interface: the rest of a forward pass stays theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.layout import Block, Sharing

NAME = "hone_packed"
_PLAIN_ARGUMENTS = {"dropout", "scaling", "is_causal", "position_ids", "use_cache", "past_key_values", "cache_position"}
_sharing: ContextVar[Sharing | None] = ContextVar("sharing", default=None)


def teach_sharing(model: Any) -> bool:
    """Whether `model` now attends as `sharing` says inside it, and as before outside. Its family must use the library's interface."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def forget_sharing(model: Any) -> None:
    model.set_attn_implementation("sdpa")


@contextmanager
def sharing(sharing: Sharing | None) -> Iterator[None]:
    """Forward passes inside are over one packed row; None: plain rows."""
    token = _sharing.set(sharing)
    try:
        yield
    finally:
        _sharing.reset(token)


def current_sharing() -> Sharing | None:
    return _sharing.get()


def _mask(*arguments: Any, **named: Any) -> Tensor | None:
    mask: Tensor | None = None if _sharing.get() else sdpa_mask(*arguments, **named)
    return mask


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """[R, heads, S, d], [R, kv heads, S, d] -> [R, S, heads, d].

    Raises: ValueError for a kind of attention that goes beyond softmax(query key) value.
    """
    shared = _sharing.get()
    if shared is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    further = {name for name, given in named.items() if given is not None} - _PLAIN_ARGUMENTS
    if further or attention_mask is not None:
        raise ValueError(f"packed rows cannot be attended to with {sorted(further)} or a mask")
    dtype = value.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    seen = [_attend_block(block, query, key, value, named.get("dropout", 0.0), named.get("scaling")) for block in shared.blocks]
    return torch.cat(seen).index_select(0, shared.order)[None], None


def _attend_block(block: Block, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """[S, heads, d], [S, kv heads, d] -> [n * T, heads, d].

    Query heads that read one key head are laid side by side: to the product they are more queries.
    """
    (count, num_queries), num_keys = block.queries.shape, block.keys.shape[1]
    heads, kv_heads = query.shape[1], key.shape[1]
    width = query.shape[2]
    queries = query.index_select(0, block.queries.flatten()).view(count, num_queries, heads, width).transpose(1, 2)
    keys, values = (
        states.index_select(0, block.keys.flatten()).view(count, num_keys, kv_heads, -1).transpose(1, 2) for states in (key, value)
    )
    folds = heads // kv_heads
    queries = queries.reshape(count, kv_heads, folds * num_queries, width)
    mask = block.mask.expand(-1, folds, -1, -1).reshape(len(block.mask), 1, folds * num_queries, num_keys).expand(count, -1, -1, -1)
    seen = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=scaling)
    return seen.view(count, heads, num_queries, -1).transpose(1, 2).reshape(count * num_queries, heads, -1)
