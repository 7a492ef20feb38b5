"""The norms and gated MLPs of Llama-like layers, computed alike with fewer passes over memory and fewer tensors kept for the backward.

Source: Zhang & Sennrich 2019 (RMSNorm), arXiv:1910.07467; Shazeer 2020 (SwiGLU), arXiv:2002.05202.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""A layer of just these gives its norms to linear layers only, which round them to the type of their products anyway."""

_SILU = ("SiLU", "SiLUActivation")


def use_lean_layers(model: nn.Module) -> None:
    """From here on the Llama-like layers of `model`, and of every deep copy of it, compute their norms and MLPs here."""
    for layer in model.modules():
        parts = dict(layer.named_children())
        if parts.keys() != _PARTS:
            continue
        for name in ("input_layernorm", "post_attention_layernorm"):
            if type(parts[name]).__name__.endswith("RMSNorm") and hasattr(parts[name], "variance_epsilon"):
                parts[name].forward = partial(_norm_forward, parts[name])
        if hasattr(parts["mlp"], "gate_proj") and type(getattr(parts["mlp"], "act_fn", None)).__name__ in _SILU:
            parts["mlp"].forward = partial(_mlp_forward, parts["mlp"])


def restore_layers(model: nn.Module) -> None:
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func in (_norm_forward, _mlp_forward):
            del module.forward


def _norm_forward(norm: Any, hidden: Tensor) -> Tensor:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    normed: Tensor = _RmsNorm.apply(hidden, norm.weight, norm.variance_epsilon, dtype)
    return normed


def _mlp_forward(mlp: Any, hidden: Tensor) -> Tensor:
    out: Tensor = mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return out


class _RmsNorm(torch.autograd.Function):
    """y = w * x * r with r = (mean x^2 + eps)^-1/2. [..., H] -> [..., H] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        inverse = (norm.square_() / hidden.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        normed: Tensor = hidden * inverse
        return normed.mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """With n = x r and g = w dy: dx = r (g - n mean(g n)), dw = sum(dy n)."""
        hidden, weight, inverse = ctx.saved_tensors
        gradient = gradients[0].to(hidden.dtype, copy=True)
        normed = hidden * inverse
        width = hidden.shape[-1]
        of_weight = (gradient * normed).view(-1, width).sum(0) if ctx.needs_input_grad[1] else None
        gradient.mul_(weight)
        along = torch.linalg.vecdot(gradient, normed)[..., None] / width
        return gradient.sub_(normed.mul_(along)).mul_(inverse), of_weight, None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up, elementwise."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return of_gate, functional.silu(gate).mul_(gradients[0])
