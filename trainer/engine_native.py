"""Decoding straight on the weights: fused projections, one preallocated key-value cache, no padding. It knows no family by name.

Rounds where the training forward pass rounds under autocast: products and cache in `dtype`, everything between in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.engine_attention import attend, causal_mask, step_mask
from trainer.engine_families import Angles, Attention, Decoder, Layer, Linear, Norm, read_decoder
from trainer.engine_graphs import Recordings
from trainer.engine_linear import Product, pack_linear
from trainer.logprobs import Head

_ROW_STEP = 8
_WIDTH_STEPS = {"cpu": 16, "cuda": 256}
"""Rows and cache positions of a step are rounded up to multiples of these, so that few shapes occur: each new one costs kernels."""
_PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class _Block:
    """A layer ready to be applied, with its part of the cache."""

    layer: Layer
    qkv: Product
    output: Product
    into_mlp: Product
    out_of_mlp: Product
    head_norm: Norm | None
    """Of queries and keys together, [heads + kv heads, d]."""
    keys: Tensor
    """[max rows, kv heads, capacity, d]."""
    values: Tensor


class NativeEngine:
    """Active rows are 0..num_rows-1 of the cache; row r holds `lengths[r]` tokens at the positions 0, 1, ..."""

    admits_at_any_time = True

    def __init__(self, model: Any, head: Head, dtype: torch.dtype, max_rows: int, capacity: int) -> None:
        self._dtype, self._device = dtype, model.device
        self._max_rows, self._capacity = max_rows, capacity
        self._decoder = read_decoder(model, capacity)
        self._head_shape = head
        self._output_head = pack_linear(Linear([head.weight.detach()], [head.bias]), dtype, max_rows)
        self._blocks = [self._make_block(layer) for layer in self._decoder.layers]
        self._lengths: list[int] = []
        self._recordings = Recordings()

    def admit(self, prompts: list[tuple[int, ...]], copies: int) -> Tensor:
        """Appends `copies` rows per prompt. -> [len(prompts) * copies, V] logits of the first completion token."""
        return torch.cat([self._prefill(part, copies) for part in _in_chunks(prompts)])

    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each active row. [b] -> [b, V] logits of the next."""
        rows = len(self._lengths)
        padding = min(_round_up(rows, _ROW_STEP), self._max_rows) - rows
        width = min(_round_up(max(self._lengths) + 1, _WIDTH_STEPS[self._device.type]), self._capacity)
        positions = torch.tensor(self._lengths + [0] * padding, device=self._device)
        logits = self._recordings.run(self._decode, functional.pad(tokens, (0, padding)), positions, width)
        self._lengths = [length + 1 for length in self._lengths]
        return logits[:rows]

    def keep(self, order: list[int]) -> None:
        """New row i is old row order[i]; a row moves only down, into the place of one that is not kept."""
        moved = [(target, source) for target, source in enumerate(order) if target != source]
        if moved:
            targets, sources = (torch.tensor(column, device=self._device) for column in zip(*moved, strict=True))
            used = max(self._lengths[source] for _, source in moved)
            for block in self._blocks:
                for cache in (block.keys, block.values):
                    cache[targets, :, :used] = cache[sources, :, :used]
        self._lengths = [self._lengths[source] for source in order]

    def _make_block(self, layer: Layer) -> _Block:
        decoder = self._decoder
        qkv, output, into_mlp, out_of_mlp = (
            pack_linear(linear, self._dtype, self._max_rows) for linear in (layer.qkv, layer.output, layer.into_mlp, layer.out_of_mlp)
        )
        shape = (2, self._max_rows, decoder.kv_heads, self._capacity, decoder.head_size)
        # Zeros, because a masked position still enters the products: 0 * NaN is NaN.
        keys, values = torch.zeros(shape, dtype=self._dtype, device=self._device)
        return _Block(layer, qkv, output, into_mlp, out_of_mlp, _head_norm(layer.attention, decoder), keys, values)

    def _prefill(self, prompts: list[tuple[int, ...]], copies: int) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        count, width = len(prompts), max(lengths)
        ids = torch.zeros(count, width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        rows = slice(len(self._lengths), len(self._lengths) + count * copies)
        hidden, angles = self._embed(ids.to(self._device), slice(0, width)), self._angles(slice(0, width))
        for block in self._blocks:
            attention = block.layer.attention
            query, key, value = self._project(block, hidden, angles)
            for cache, new in ((block.keys, key), (block.values, value)):
                copied = new.transpose(1, 2)[:, None].expand(-1, copies, -1, -1, -1)
                cache[rows, :, :width].unflatten(0, (count, copies)).copy_(copied)
            mask = causal_mask(width, attention.window, self._device)
            seen = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, attention)
            hidden = self._finish_layer(block, hidden, seen.transpose(1, 2).flatten(2))
        self._lengths += [length for length in lengths for _ in range(copies)]
        last = hidden[torch.arange(count, device=self._device), torch.tensor(lengths, device=self._device) - 1]
        return self._logits(last).repeat_interleave(copies, 0)

    def _decode(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """[b] newest tokens at `positions` [b], the cache as far as `width` -> [b, V] logits."""
        rows, decoder = len(tokens), self._decoder
        index = torch.arange(rows, device=self._device)
        hidden, angles = self._embed(tokens, positions), self._angles(positions)
        windows = {block.layer.attention.window for block in self._blocks}
        masks = {window: step_mask(positions, width, window, self._dtype) for window in windows}
        for block in self._blocks:
            attention = block.layer.attention
            query, key, value = self._project(block, hidden, angles)
            block.keys[index, :, positions] = key
            block.values[index, :, positions] = value
            grouped = query.unflatten(1, (decoder.kv_heads, -1))
            seen = attend(grouped, block.keys[:rows, :, :width], block.values[:rows, :, :width], masks[attention.window], attention)
            hidden = self._finish_layer(block, hidden, seen.flatten(1))
        return self._logits(hidden)

    def _embed(self, ids: Tensor, positions: Tensor | slice) -> Tensor:
        """-> [..., H] float32."""
        decoder = self._decoder
        hidden = decoder.embedding[ids].float()
        if decoder.embedding_scale != 1.0:
            hidden *= decoder.embedding_scale
        return hidden if decoder.positions is None else hidden + decoder.positions[positions]

    def _angles(self, positions: Tensor | slice) -> dict[str, Angles]:
        """Those of `positions`, for each head alike: [..., 1, d]."""
        chosen = self._decoder.angles.items()
        return {kind: Angles(angles.cos[positions][..., None, :], angles.sin[positions][..., None, :]) for kind, angles in chosen}

    def _project(self, block: _Block, hidden: Tensor, angles: dict[str, Angles]) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H] -> query [..., heads, d], key and value [..., kv heads, d], in `dtype`."""
        decoder, attention = self._decoder, block.layer.attention
        mixed = block.qkv(_normalise(hidden, block.layer.attention_norm).to(self._dtype)).unflatten(-1, (-1, decoder.head_size))
        turned, value = mixed.split([decoder.heads + decoder.kv_heads, decoder.kv_heads], -2)
        if block.head_norm is not None or attention.angles is not None:
            wide = turned.float()
            if block.head_norm is not None:
                wide = functional.rms_norm(wide, wide.shape[-1:], None, block.head_norm.eps) * block.head_norm.weight
            turned = (wide if attention.angles is None else _rotate(wide, angles[attention.angles])).to(self._dtype)
        query, key = turned.split([decoder.heads, decoder.kv_heads], -2)
        return query, key, value

    def _finish_layer(self, block: _Block, hidden: Tensor, seen: Tensor) -> Tensor:
        layer = block.layer
        hidden = hidden + _normalise_if(block.output(seen), layer.attention_post_norm)
        mixed = block.into_mlp(_normalise(hidden, layer.mlp_norm).to(self._dtype))
        if layer.is_gated:
            gate, up = mixed.chunk(2, -1)
            mixed = layer.activation(gate) * up
        else:
            mixed = layer.activation(mixed)
        return hidden + _normalise_if(block.out_of_mlp(mixed), layer.mlp_post_norm)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[b, H] float32 -> [b, V] float32."""
        normed = _normalise(hidden, self._decoder.norm).to(self._dtype)
        return self._head_shape.finish(self._output_head(normed).float())


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _head_norm(attention: Attention, decoder: Decoder) -> Norm | None:
    query, key = attention.query_norm, attention.key_norm
    if query is None or key is None:
        return None
    weight = torch.cat([query.weight.expand(decoder.heads, -1), key.weight.expand(decoder.kv_heads, -1)])
    return Norm(weight, query.eps)


def _normalise(hidden: Tensor, norm: Norm) -> Tensor:
    """In float32."""
    if norm.bias is not None:
        return functional.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, norm.eps)
    return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.eps)


def _normalise_if(hidden: Tensor, norm: Norm | None) -> Tensor:
    return hidden if norm is None else _normalise(hidden.float(), norm)


def _rotate(states: Tensor, angles: Angles) -> Tensor:
    """[..., heads, d] -> the same."""
    return (states * angles.cos).addcmul_(states.roll(states.shape[-1] // 2, -1), angles.sin)


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
