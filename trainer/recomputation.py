"""Gradient checkpointing: in a forward pass a layer keeps its input alone, and the backward pass computes the layer again.

The library's own switch works in training mode only, which would turn dropout on.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from core.errors import InvalidRequest
from trainer.adapters import POLICY, adapter_in_use, only_adapter
from trainer.layout import Sharing
from trainer.packed_attention import current_sharing, sharing


def recompute_layers(model: nn.Module) -> None:
    """From here on `model`, and every deep copy of it, keeps only the inputs of its layers where gradients are on.

    Raises: InvalidRequest where the model's family does not say which of its modules are such layers.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InvalidRequest(f"{type(model).__name__} has no layers that can be computed again.", param="gradient_checkpointing")
    for layer in layers:
        layer.forward = partial(_forward, layer)


def _forward(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The layer's output. No random number is drawn in a layer, so the generator's state is left alone."""
    forward = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, layer), **named)


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward pass and of its repetition, when other rows may be in work and another adapter in use."""
    return nullcontext(), _as_now(layer, adapter_in_use(layer), current_sharing())


@contextmanager
def _as_now(layer: nn.Module, adapter: str, shared: Sharing | None) -> Iterator[None]:
    with sharing(shared), nullcontext() if adapter == POLICY else only_adapter(layer, adapter):
        yield
