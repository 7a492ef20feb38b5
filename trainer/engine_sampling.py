"""From logits to tokens: inverse CDF in token-id order with one given uniform number per row."""

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 256
"""Token ids summed together before the cumulative sum, which makes it short."""


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, their log-probs) from softmax(logits / temperature). [b, V] float32, [b] float64 -> [b] int64, [b] float32.

    The cumulative distribution is float64. Temperature 0 takes the most likely token, with log-prob 0.
    """
    if temperature == 0.0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros(len(tokens), device=logits.device)
    log_p = (logits / temperature).log_softmax(-1)
    blocks = _blocks(log_p.exp())
    # Searched on the CPU: torch has no deterministic cumulative sum of floats on a GPU, and these are small.
    cumulative = blocks.sum(-1, dtype=torch.float64).cpu().cumsum(-1)
    wanted = _below(uniforms.cpu()[:, None] * cumulative[:, -1:], cumulative[:, -1:])
    block = torch.searchsorted(cumulative, wanted, right=True)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    chosen = blocks.gather(1, block[:, :, None].to(blocks.device).expand(-1, -1, _BLOCK))[:, 0]
    inner = chosen.double().cpu().cumsum(-1)
    place = torch.searchsorted(inner, _below(wanted - before, inner[:, -1:]), right=True)
    tokens = (block * _BLOCK + place)[:, 0].to(logits.device)
    return tokens, log_p.gather(1, tokens[:, None])[:, 0]


def _blocks(probabilities: Tensor) -> Tensor:
    """[b, V] -> [b, ceil(V / 256), 256], filled up with zeros."""
    rows, vocabulary = probabilities.shape
    missing = -vocabulary % _BLOCK
    padded = functional.pad(probabilities, (0, missing)) if missing else probabilities
    return padded.view(rows, -1, _BLOCK)


def _below(wanted: Tensor, total: Tensor) -> Tensor:
    """`wanted`, kept under `total`, so that the search finds a token of positive probability whatever was rounded."""
    return torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
