"""What a freshly loaded model can do, found out by trying it on a few tokens rather than from a list of families."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import InvalidRequest
from trainer.batch import Batch
from trainer.layout import group_shapes, pack, pad
from trainer.lean_layers import restore_layers, use_lean_layers
from trainer.logprobs import Head
from trainer.packed_attention import forget_sharing, sharing, teach_sharing

_TOLERANCE = 1e-3
"""Relative to the largest number: float32 noise is below 1e-5, a wrong formula above 1e-1."""


@dataclass(frozen=True)
class HeadShape:
    """What a model does to its logits after the output layer."""

    scale: float
    soft_cap: float | None


def describe_head(model: Any) -> HeadShape:
    """From the names that configurations use: Gemma's soft cap, Cohere's factor, Granite's divisor."""
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return HeadShape((getattr(config, "logit_scale", None) or 1.0) / divisor, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: Any, shape: HeadShape) -> None:
    """Raises: InvalidRequest where our head does not give the model's own logits."""
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    layer = model.get_output_embeddings()
    if layer is None:
        raise InvalidRequest(f"{type(model).__name__} has no output layer of its own.", param="model")
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = Head(layer.weight, getattr(layer, "bias", None), shape.scale, shape.soft_cap).logits(hidden, hidden.dtype)
    if not _agree(ours, model(input_ids=ids, use_cache=False).logits[0]):
        raise InvalidRequest(f"{type(model).__name__} computes its logits in a way that this trainer does not know.", param="model")


@torch.no_grad()
def takes_packed_rows(model: Any) -> bool:
    """Teaches `model` to attend over packed rows; False where it gives them other hidden states than plain rows, and stays as it was.

    Windowed attention counts as no.
    """
    config = model.config.get_text_config()
    windows = [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"]
    if windows or _has_window(config) or not teach_sharing(model):
        return False
    batch = _probe_batch(model.device)
    groups = group_shapes(batch)
    packed, plain = pack(batch, groups, model.dtype), pad(batch, groups)
    expected = model.base_model(input_ids=plain.input_ids, use_cache=False).last_hidden_state
    try:
        with sharing(packed.sharing):
            seen = model.base_model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).last_hidden_state
        agrees = _agree(seen.flatten(0, 1)[packed.sources], expected.flatten(0, 1)[plain.sources])
    except (TypeError, ValueError, RuntimeError, IndexError):
        agrees = False  # This family attends in a way of its own: that is the answer to the question.
    if not agrees:
        forget_sharing(model)
    return agrees


@torch.no_grad()
def make_layers_lean(model: Any) -> None:
    """Where that gives `model` the same hidden states as its own code."""
    ids = torch.arange(6, device=model.device)[None] % model.config.get_text_config().vocab_size
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    use_lean_layers(model)
    if not _agree(model.base_model(input_ids=ids, use_cache=False).last_hidden_state, expected):
        restore_layers(model)


def _has_window(config: Any) -> bool:
    if getattr(config, "attention_chunk_size", None):
        return True
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))


def _probe_batch(device: torch.device) -> Batch:
    """One group: a prompt of three tokens, completions of three and two."""
    mask = torch.tensor([[True, True, True], [True, True, False]], device=device)
    zeros = torch.zeros(2, device=device)
    return Batch(
        prompt_ids=torch.tensor([[1, 2, 3]] * 2, device=device),
        prompt_mask=torch.ones(2, 3, dtype=torch.bool, device=device),
        completion_ids=torch.tensor([[4, 5, 6], [7, 8, 0]], device=device),
        completion_mask=mask,
        sampling_logprobs=torch.zeros(2, 3, device=device),
        rewards=zeros.double(),
        counts=zeros == 0,
        groups=torch.zeros(2, dtype=torch.int64, device=device),
        truncated=zeros != 0,
    )


def _agree(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours - expected).abs().max() <= _TOLERANCE * expected.abs().max())
