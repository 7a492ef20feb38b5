"""What the decode engine knows of a model: its weights and how they are put together, as plain records without names of families.

A family is a class of transformers whose forward pass these records describe whole. Any other one is not guessed at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.adapters import base_linear, merged_weight

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles do not depend on the length of the text."""
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where there is a bias: normalised * weight + bias."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class Linear:
    """The stacked weights [out, in] and biases [out] of layers with the same input."""

    weights: list[Tensor]
    biases: list[Tensor | None]


@dataclass(frozen=True)
class Angles:
    """Rotary positions [positions, head size]: states * cos + (states with their halves swapped) * sin."""

    cos: Tensor
    sin: Tensor
    """Negative in the first half."""


@dataclass(frozen=True)
class Attention:
    """What a layer's attention does with queries, keys and values of `Decoder.head_size`."""

    scale: float
    angles: str | None
    """Which of `Decoder.angles` turn queries and keys."""
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    window: int | None = None
    """A token sees itself and the `window` - 1 before it. None: all."""

    soft_cap: float | None = None
    """c * tanh(scores / c)."""


@dataclass(frozen=True)
class Layer:
    """hidden += post_norm(output(attention(qkv(norm(hidden))))), and the like for the feed-forward half."""

    attention: Attention
    attention_norm: Norm
    qkv: Linear
    output: Linear
    attention_post_norm: Norm | None
    mlp_norm: Norm
    into_mlp: Linear
    """Where gated, gate and up stacked: activation(gate) * up."""
    is_gated: bool
    activation: Callable[[Tensor], Tensor]
    out_of_mlp: Linear
    mlp_post_norm: Norm | None


@dataclass(frozen=True)
class Decoder:
    embedding: Tensor
    """[V, H]."""
    embedding_scale: float
    positions: Tensor | None
    """[positions, H], added to the embedding of the token there."""
    heads: int
    kv_heads: int
    head_size: int
    angles: dict[str, Angles]
    layers: list[Layer]
    norm: Norm


def is_native(model: Any) -> bool:
    """Whether `read_decoder` describes what `model` computes."""
    config = model.config
    if type(model).__name__ not in _READERS or getattr(config, "add_cross_attention", False):
        return False
    if getattr(config, "use_bidirectional_attention", False):
        return False
    if any(kind not in _LAYER_TYPES for kind in getattr(config, "layer_types", None) or []):
        return False
    return all(rope.get("rope_type", "default") in _ROPE_TYPES for rope in _rope_parameters(config).values())


def read_decoder(model: Any, num_positions: int) -> Decoder:
    """The current weights of `model`, adapters merged, with position tables for `num_positions` tokens."""
    return _READERS[type(model).__name__](model, num_positions)


def _read_llama(model: Any, num_positions: int) -> Decoder:
    """Llama and those that differ from it in norms, windows and caps, and use its names."""
    config, base = model.config, model.base_model
    angles = _read_angles(model, num_positions)
    kinds = _layer_kinds(config)
    return Decoder(
        embedding=model.get_input_embeddings().weight.detach(),
        embedding_scale=float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)),
        positions=None,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=base.layers[0].self_attn.head_dim,
        angles=angles,
        layers=[
            _read_llama_layer(layer, config, kind, kind if kind in angles else "") for layer, kind in zip(base.layers, kinds, strict=True)
        ],
        norm=_read_norm(base.norm),
    )


def _read_llama_layer(layer: Any, config: Any, kind: str, angles: str) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    has_post_norms = hasattr(layer, "pre_feedforward_layernorm")
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        attention=Attention(
            scale=attention.scaling,
            angles=angles,
            query_norm=None if query_norm is None else _read_norm(query_norm),
            key_norm=None if key_norm is None else _read_norm(key_norm),
            window=config.sliding_window if kind == "sliding_attention" else None,
            # Gemma 3 has the field and does not use it: what the library leaves out of the forward pass is no cap.
            soft_cap=config.attn_logit_softcapping if type(attention).__name__ == "Gemma2Attention" else None,
        ),
        attention_norm=_read_norm(layer.input_layernorm),
        qkv=_stack(attention.q_proj, attention.k_proj, attention.v_proj),
        output=_stack(attention.o_proj),
        attention_post_norm=_read_norm(layer.post_attention_layernorm) if has_post_norms else None,
        mlp_norm=_read_norm(layer.pre_feedforward_layernorm if has_post_norms else layer.post_attention_layernorm),
        into_mlp=_stack(mlp.gate_proj, mlp.up_proj),
        is_gated=True,
        activation=mlp.act_fn,
        out_of_mlp=_stack(mlp.down_proj),
        mlp_post_norm=_read_norm(layer.post_feedforward_layernorm) if has_post_norms else None,
    )


def _read_gpt2(model: Any, num_positions: int) -> Decoder:
    base, heads = model.base_model, model.config.num_attention_heads
    return Decoder(
        embedding=base.wte.weight.detach(),
        embedding_scale=1.0,
        positions=base.wpe.weight.detach()[:num_positions],
        heads=heads,
        kv_heads=heads,
        head_size=base.h[0].attn.head_dim,
        angles={},
        layers=[_read_gpt2_layer(layer) for layer in base.h],
        norm=_read_norm(base.ln_f),
    )


def _read_gpt2_layer(layer: Any) -> Layer:
    return Layer(
        attention=Attention(scale=layer.attn.scaling, angles=None),
        attention_norm=_read_norm(layer.ln_1),
        qkv=_stack(layer.attn.c_attn),
        output=_stack(layer.attn.c_proj),
        attention_post_norm=None,
        mlp_norm=_read_norm(layer.ln_2),
        into_mlp=_stack(layer.mlp.c_fc),
        is_gated=False,
        activation=layer.mlp.act,
        out_of_mlp=_stack(layer.mlp.c_proj),
        mlp_post_norm=None,
    )


_READERS: dict[str, Callable[[Any, int], Decoder]] = {
    "LlamaForCausalLM": _read_llama,
    "MistralForCausalLM": _read_llama,
    "Qwen2ForCausalLM": _read_llama,
    "Qwen3ForCausalLM": _read_llama,
    "GemmaForCausalLM": _read_llama,
    "Gemma2ForCausalLM": _read_llama,
    "Gemma3ForCausalLM": _read_llama,
    "GPT2LMHeadModel": _read_gpt2,
}


def _layer_kinds(config: Any) -> list[str]:
    """Of each layer. Without a list, a window is that of every layer (Mistral)."""
    given: list[str] | None = getattr(config, "layer_types", None)
    is_windowed = getattr(config, "sliding_window", None) is not None
    return list(given) if given else ["sliding_attention" if is_windowed else "full_attention"] * config.num_hidden_layers


def _rope_parameters(config: Any) -> dict[str, Any]:
    """By kind of layer; by "" where all layers have the same. Empty without rotary positions."""
    given = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in given.values()):
        return {kind: rope for kind, rope in given.items() if rope is not None}
    return {"": given} if given else {}


@torch.no_grad()
def _read_angles(model: Any, num_positions: int) -> dict[str, Angles]:
    rotary, probe = model.base_model.rotary_emb, torch.zeros(1, device=model.device)
    positions = torch.arange(num_positions, device=model.device)[None]
    tables = {}
    for kind in _rope_parameters(model.config):
        cos, sin = rotary(probe, positions, kind) if kind else rotary(probe, positions)
        first, second = sin[0].chunk(2, -1)
        tables[kind] = Angles(cos[0], torch.cat([-first, second], -1))
    return tables


def _read_norm(norm: Any) -> Norm:
    weight = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        assert norm.bias is not None, "the families here have LayerNorms with biases"
        return Norm(weight, norm.eps, norm.bias.detach())
    if type(norm).__name__.startswith("Gemma"):
        return Norm(1.0 + weight.float(), norm.eps)
    return Norm(weight, norm.variance_epsilon)


def _stack(*linears: Any) -> Linear:
    return Linear([_weight(linear) for linear in linears], [base_linear(linear).bias for linear in linears])


def _weight(linear: Any) -> Tensor:
    """[out, in]."""
    weight = merged_weight(linear)
    return weight.t() if isinstance(base_linear(linear), Conv1D) else weight
