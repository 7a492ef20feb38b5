"""Linear layers with the weights laid out once for the processor that applies them at every token."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trainer.engine_families import Linear

Product = Callable[[Tensor], Tensor]
"""[..., in] -> [..., out], both in the working dtype."""


def pack_linear(linear: Linear, dtype: torch.dtype, rows: int) -> Product:
    """On a CPU with oneDNN the weight is laid out for products of about `rows` rows."""
    weight = torch.cat([part.to(dtype) for part in linear.weights]).contiguous()
    bias = _stacked_bias(linear, dtype)
    if not _is_packed(weight):
        return lambda x: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def product(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result

    return product


def _is_packed(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _stacked_bias(linear: Linear, dtype: torch.dtype) -> Tensor | None:
    """Layers without a bias among layers with one (Qwen2 has none in its output) get zeros."""
    if all(bias is None for bias in linear.biases):
        return None
    pairs = zip(linear.weights, linear.biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight), dtype=dtype) if bias is None else bias.detach().to(dtype) for weight, bias in pairs])
