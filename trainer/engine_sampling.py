"""From logits to tokens: which of them may be drawn, and inverse CDF in token-id order with one given uniform number per row."""

import math

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 256
"""Token ids summed together before the cumulative sum, which makes it short."""


def kept_tokens(logits: Tensor, temperature: float, *, top_k: int | None, top_p: float, min_p: float) -> Tensor:
    """Which tokens may be drawn. [b, V] -> [b, V] bool, at least one True per row.

    Each filter keeps the beginning of the tokens ranked by softmax(logits / temperature), equal ones by id: top_k the first so many;
    top_p the fewest whose share of what top_k left reaches top_p; min_p those at least min_p times as likely as the first.
    The shortest beginning is kept.
    Source: Fan et al. 2018, arXiv:1805.04833 (top_k); Holtzman et al. 2020, arXiv:1904.09751 (top_p); Nguyen et al. 2025,
    arXiv:2407.01082 (min_p).
    """
    scaled = logits / temperature
    most = min(top_k or scaled.shape[-1], scaled.shape[-1])
    counts = torch.full((len(scaled),), most, device=scaled.device)
    if top_p < 1.0:
        counts = torch.minimum(counts, _nucleus_sizes(scaled, most, top_p))
    if min_p > 0.0:
        counts = torch.minimum(counts, (scaled >= scaled.amax(-1, keepdim=True) + math.log(min_p)).sum(-1))
    return _first_ranked(scaled, counts)


def kept_ids(kept: Tensor) -> list[Tensor]:
    """The ids of each row in ascending order. [b, V] bool -> b tensors [k] int32 on the CPU."""
    return list(kept.nonzero()[:, 1].int().cpu().split(kept.sum(-1).tolist()))


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(tokens, their log-probs) from softmax(logits / temperature). [b, V] float32, [b] float64 -> [b] int64, [b] float32.

    `kept` [b, V] bool: the distribution is renormalised over these tokens.
    Temperature 0 takes the most likely token, with log-prob 0.
    """
    if temperature == 0.0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros(len(tokens), device=logits.device)
    scaled = logits if temperature == 1.0 else logits / temperature
    if kept is not None:
        scaled = scaled.masked_fill(~kept, -math.inf)
    blocks = _blocks(scaled.softmax(-1))
    block, rest = _find(blocks.sum(-1), uniforms.to(logits.device)[:, None])
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    place, _ = _find(chosen, rest)
    return (block * _BLOCK + place)[:, 0], chosen.gather(1, place)[:, 0].log()


def _nucleus_sizes(scaled: Tensor, most: int, top_p: float) -> Tensor:
    """How many of the `most` likeliest tokens it takes to reach `top_p` of their common probability. [b, V] -> [b] int64."""
    vocabulary = scaled.shape[-1]
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    if most == vocabulary:
        # Tokens less likely than (1 - top_p) / V have less than 1 - top_p together: none of them is needed, so none is ranked.
        total = weights.sum(-1, keepdim=True, dtype=torch.float64)
        most = int((weights >= total * ((1.0 - top_p) / vocabulary)).sum(-1).max())
        ranked = weights.topk(most).values.double()
    else:
        ranked = weights.topk(most).values.double()
        total = ranked.sum(-1, keepdim=True)
    # On the CPU: torch has no deterministic cumulative sum of floats on a GPU.
    before = functional.pad(ranked.cpu().cumsum(-1)[:, :-1], (1, 0))
    return (before < top_p * total.cpu()).sum(-1).to(scaled.device)


def _first_ranked(scaled: Tensor, counts: Tensor) -> Tensor:
    """The largest `counts` [b] of each row, equal ones by id. [b, V] -> [b, V] bool."""
    counts = counts[:, None]
    last = scaled.topk(int(counts.max())).values.gather(1, counts - 1)
    above, tied = scaled > last, scaled == last
    return above | (tied & (tied.cumsum(-1) <= counts - above.sum(-1, keepdim=True)))


def _blocks(probabilities: Tensor) -> Tensor:
    """[b, V] -> [b, ceil(V / 256), 256], filled up with zeros."""
    rows, vocabulary = probabilities.shape
    missing = -vocabulary % _BLOCK
    padded = functional.pad(probabilities, (0, missing)) if missing else probabilities
    return padded.view(rows, -1, _BLOCK)


def _find(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first place where the share of all `weights` up to it exceeds the uniform number, and how far inside it that lies.

    [b, n], [b, 1] float64 in [0, 1) -> [b, 1] int64, [b, 1] float64 in [0, 1). The place has a positive weight, whatever was rounded.
    Counted in integers, whose cumulative sum is exact, and deterministic on a GPU too.
    """
    largest = weights.amax(-1, keepdim=True).double()
    units = (weights.double() / largest * (2.0**61 / weights.shape[-1])).long()
    ends = units.cumsum(-1)
    wanted = (uniforms * ends[:, -1:]).long().minimum(ends[:, -1:] - 1)
    place = torch.searchsorted(ends, wanted, right=True)
    size = units.gather(1, place)
    return place, (wanted - ends.gather(1, place) + size).double() / size
