"""Decoding for Llama and its relatives, straight on the weights: fused projections, one preallocated key-value cache, no padding.

Rounds where the training forward pass rounds under autocast: products and cache in `dtype`, everything between in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.adapters import base_linear, merged_weight
from trainer.logprobs import Head

_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles do not depend on the length of the text."""
_ROW_STEP = 8
"""Row counts are rounded up to a multiple of this, so that few shapes occur: each new shape costs a kernel."""
_PREFILL_TOKENS = 4096

Linear = Callable[[Tensor], Tensor]


def is_native(model: Any) -> bool:
    """Whether this engine computes what `model` computes."""
    config = model.config
    if type(model).__name__ not in _FAMILIES:
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return False
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") in _ROPE_TYPES


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class NativeEngine:
    """Active rows are 0..num_rows-1 of the cache; row r holds `lengths[r]` tokens at the positions 0, 1, ..."""

    admits_at_any_time = True

    def __init__(self, model: Any, head: Head, dtype: torch.dtype, max_rows: int, capacity: int) -> None:
        config = model.config
        first = model.base_model.layers[0].self_attn
        self._dtype, self._device = dtype, model.device
        self._max_rows = max_rows
        self._head_dim = first.head_dim
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._scale, self._eps = first.scaling, config.rms_norm_eps
        self._activation = model.base_model.layers[0].mlp.act_fn
        self._embedding = model.get_input_embeddings().weight.detach()
        self._norm = model.base_model.norm.weight.detach()
        self._head_shape = head
        make = _linear_maker(dtype, self._device, max_rows)
        self._layers = [_read_layer(layer, make) for layer in model.base_model.layers]
        self._output_head = make([head.weight.detach()], [head.bias])
        positions = torch.arange(capacity, device=self._device)[None]
        cos, sin = model.base_model.rotary_emb(self._embedding[:1, None].float(), positions)
        self._cos, self._sin = cos[0].float(), sin[0].float()
        shape = (len(self._layers), max_rows, self._kv_heads, capacity, self._head_dim)
        # Zeros, because a masked position still enters the products: 0 * NaN is NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=self._device)
        self._values = torch.zeros(shape, dtype=dtype, device=self._device)
        self._lengths = torch.zeros(max_rows, dtype=torch.int64, device=self._device)
        self._num_rows = 0

    def admit(self, prompts: list[tuple[int, ...]], copies: int) -> Tensor:
        """Appends `copies` rows per prompt. -> [len(prompts) * copies, V] logits of the first completion token."""
        logits = [self._prefill(part, copies) for part in _in_chunks(prompts)]
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each active row. [b] -> [b, V] logits of the next."""
        rows = self._num_rows
        padded = min(-(-rows // _ROW_STEP) * _ROW_STEP, self._max_rows)
        tokens = functional.pad(tokens, (0, padded - rows))
        self._lengths[rows:padded] = 0
        positions = self._lengths[:padded].clone()
        hidden = self._decode(self._embedding[tokens].float(), positions, int(positions.max()) + 1)
        self._lengths[:rows] += 1
        return self._logits(hidden)[:rows]

    def keep(self, order: list[int]) -> None:
        """New row i is old row order[i]; a row moves only down, into the place of one that is not kept."""
        moved = [(target, source) for target, source in enumerate(order) if target != source]
        if moved:
            targets, sources = (torch.tensor(column, device=self._device) for column in zip(*moved, strict=True))
            used = int(self._lengths[sources].max())
            for cache in (self._keys, self._values):
                cache[:, targets, :, :used] = cache[:, sources, :, :used]
            self._lengths[targets] = self._lengths[sources]
        self._num_rows = len(order)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[b, H] float32 -> [b, V] float32."""
        return self._head_shape.finish(self._output_head(hidden.to(self._dtype)).float())

    def _prefill(self, prompts: list[tuple[int, ...]], copies: int) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        count, width = len(prompts), int(lengths.max())
        ids = torch.zeros(count, width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        rows = slice(self._num_rows, self._num_rows + count * copies)
        hidden = self._embedding[ids.to(self._device)].float()
        cos, sin = self._cos[:width, None], self._sin[:width, None]
        for index, layer in enumerate(self._layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            for cache, new in ((self._keys, key), (self._values, value)):
                copied = new.transpose(1, 2)[:, None].expand(-1, copies, -1, -1, -1)
                cache[index, rows, :, :width].view(count, copies, self._kv_heads, width, -1).copy_(copied)
            seen = functional.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, scale=self._scale, enable_gqa=True
            )
            hidden = self._finish_layer(layer, hidden, seen.transpose(1, 2).flatten(2))
        self._lengths[rows] = lengths.repeat_interleave(copies)
        self._num_rows = rows.stop
        last = hidden[torch.arange(count, device=self._device), lengths - 1]
        return self._logits(_rms_norm(last, self._norm, self._eps)).repeat_interleave(copies, 0)

    def _decode(self, hidden: Tensor, positions: Tensor, width: int) -> Tensor:
        """[b, H] of the newest tokens at `positions` [b] -> [b, H] after the last norm."""
        rows = len(hidden)
        index = torch.arange(rows, device=self._device)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        is_seen = torch.arange(width, device=self._device) <= positions[:, None]
        mask = torch.zeros(rows, 1, 1, width, dtype=self._dtype, device=self._device)
        mask.masked_fill_(~is_seen[:, None, None], float("-inf"))
        mask = mask.expand(rows, 1, self._heads // self._kv_heads, width)
        for keys, values, layer in zip(self._keys, self._values, self._layers, strict=True):
            query, key, value = self._project(layer, hidden, cos, sin)
            keys[index, :, positions] = key
            values[index, :, positions] = value
            grouped = query.view(rows, self._kv_heads, -1, self._head_dim)
            seen = functional.scaled_dot_product_attention(
                grouped, keys[:rows, :, :width], values[:rows, :, :width], mask, scale=self._scale
            )
            hidden = self._finish_layer(layer, hidden, seen.reshape(rows, -1))
        return _rms_norm(hidden, self._norm, self._eps)

    def _project(self, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> query [..., heads, d], key and value [..., kv heads, d], in `dtype`."""
        normed = _rms_norm(hidden, layer.attention_norm, self._eps).to(self._dtype)
        mixed = layer.qkv(normed).unflatten(-1, (-1, self._head_dim))
        query, key, value = mixed.split([self._heads, self._kv_heads, self._kv_heads], -2)
        query, key = query.float(), key.float()
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = _rms_norm(query, layer.query_norm, self._eps), _rms_norm(key, layer.key_norm, self._eps)
        return _rotate(query, cos, sin).to(self._dtype), _rotate(key, cos, sin).to(self._dtype), value

    def _finish_layer(self, layer: _Layer, hidden: Tensor, seen: Tensor) -> Tensor:
        hidden = hidden + layer.output(seen)
        normed = _rms_norm(hidden, layer.mlp_norm, self._eps).to(self._dtype)
        gate, up = layer.gate_up(normed).chunk(2, -1)
        return hidden + layer.down(self._activation(gate) * up)


def _read_layer(layer: Any, make: Callable[[list[Tensor], list[Tensor | None]], Linear]) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def fuse(*linears: Any) -> Linear:
        return make([merged_weight(linear) for linear in linears], [base_linear(linear).bias for linear in linears])

    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else norm.weight.detach() for norm in norms)
    return _Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=query_norm,
        key_norm=key_norm,
        output=fuse(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=fuse(mlp.gate_proj, mlp.up_proj),
        down=fuse(mlp.down_proj),
    )


def _linear_maker(dtype: torch.dtype, device: torch.device, rows: int) -> Callable[[list[Tensor], list[Tensor | None]], Linear]:
    """Makes one linear layer of several weights and biases stacked; on a CPU with oneDNN, with the weight laid out for it once."""
    is_prepacked = device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def make(weights: list[Tensor], biases: list[Tensor | None]) -> Linear:
        weight = torch.cat([part.to(dtype) for part in weights]).contiguous()
        kept = [part.detach().to(dtype) for part in biases if part is not None]
        bias = torch.cat(kept) if kept else None
        if not is_prepacked or dtype not in (torch.float32, torch.bfloat16):
            return lambda x: functional.linear(x, weight, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

        def linear(x: Tensor) -> Tensor:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
            return product

        return linear

    return make


def _in_chunks(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Consecutive prompts that make at most `_PREFILL_TOKENS` tokens with their padding (one prompt at least)."""
    chunks: list[list[tuple[int, ...]]] = []
    for prompt in prompts:
        joined = [*chunks[-1], prompt] if chunks else [prompt]
        if chunks and len(joined) * max(map(len, joined)) <= _PREFILL_TOKENS:
            chunks[-1] = joined
        else:
            chunks.append([prompt])
    return chunks


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: halves (a, b) -> (a cos - b sin, b cos + a sin)."""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin
