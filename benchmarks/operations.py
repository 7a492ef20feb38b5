"""What one GRPO step of a Llama-like model needs by arithmetic: bytes, and floating-point operations (a multiply-add is two).

Counted are matrix products and attention; norms, activations and softmax are left out, so what follows is a lower bound.
"""

from dataclasses import dataclass
from typing import Any, Self

FLOAT32_BYTES = 4
BACKWARD = 2
"""A product's backward pass is two products of its size: one for its input's gradient, one for its weight's."""

ADAMW_READS, ADAMW_WRITES = 4, 3
"""Weight, gradient and two moments are read; weight and moments are written."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama and its relatives; the output layer shares the embedding's weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Self:
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocabulary=config.vocab_size,
        )

    @property
    def layer_products(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each product of one layer: queries, keys and values; output; gate and up; down."""
        return [
            (self.hidden, (self.heads + 2 * self.kv_heads) * self.head_dim),
            (self.heads * self.head_dim, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def layer_weights(self) -> int:
        """Of all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.layer_products)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.layer_weights + self.head_weights + (2 * self.layers + 1) * self.hidden

    @property
    def pair_operations(self) -> int:
        """Of one query and one key in all layers and heads: a product with the key and one with the value."""
        return 4 * self.layers * self.heads * self.head_dim


@dataclass(frozen=True)
class Work:
    """One step: every prompt and every completion of the same length."""

    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def packed_tokens(self) -> int:
        """With each prompt once for its group."""
        return self.prompts * (self.prompt_tokens + self.group_size * self.completion_tokens)


@dataclass(frozen=True)
class Needs:
    operations: float
    bytes: float


def rollout_needs(shape: Shape, work: Work, weight_bytes: int) -> Needs:
    """Each prompt is read once; each token but a completion's last is fed back once. `weight_bytes`: of one number of weights and cache.

    Every pass reads all weights once, and of the cache what its tokens look at.
    """
    passes = work.completion_tokens - 1
    fed = work.rows * passes
    looked_at = work.rows * sum(work.prompt_tokens + position for position in range(1, work.completion_tokens))
    prompt_pairs = work.prompts * _causal_pairs(work.prompt_tokens)
    products = 2 * shape.layer_weights * (work.prompts * work.prompt_tokens + fed) + 2 * shape.head_weights * (work.prompts + fed)
    cache = looked_at * 2 * shape.layers * shape.kv_heads * shape.head_dim
    weights = (shape.layer_weights + shape.head_weights) * (1 + passes)
    return Needs(products + shape.pair_operations * (prompt_pairs + looked_at), weight_bytes * (weights + cache))


def update_needs(shape: Shape, work: Work) -> Needs:
    """Forward and backward over packed rows; the head sees completion tokens only. Bytes are not what limits it, and not counted."""
    completion_pairs = work.completion_tokens * work.prompt_tokens + _causal_pairs(work.completion_tokens)
    pairs = work.prompts * _causal_pairs(work.prompt_tokens) + work.rows * completion_pairs
    forward = 2 * shape.layer_weights * work.packed_tokens
    forward += 2 * shape.head_weights * work.rows * work.completion_tokens
    forward += shape.pair_operations * pairs
    return Needs((1 + BACKWARD) * forward, 0.0)


def optimizer_needs(shape: Shape) -> Needs:
    """AdamW with float32 state; the gradient's norm is taken before, in the update."""
    return Needs(0.0, FLOAT32_BYTES * shape.parameters * (ADAMW_READS + ADAMW_WRITES))


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
