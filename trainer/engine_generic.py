"""Decoding for every other family: the model's own forward pass with the library's cache, prompts padded on the left."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trainer.policy import Policy


class GenericEngine:
    """Rows are admitted together, when no other row is active, because the cache holds all of them at one length."""

    admits_at_any_time = False

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.int64, device=policy.device)

    def admit(self, prompts: list[tuple[int, ...]], copies: int) -> Tensor:
        """Starts with `copies` rows per prompt. -> [len(prompts) * copies, V] logits of the first completion token."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self._mask = mask.to(self._policy.device)
        self._cache = DynamicCache(config=self._policy.model_config)
        logits = self._forward(ids.to(self._policy.device))
        self._select(torch.arange(len(prompts), device=self._mask.device).repeat_interleave(copies))
        return logits.repeat_interleave(copies, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each active row. [b] -> [b, V] logits of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        return self._forward(tokens[:, None])

    def keep(self, order: list[int]) -> None:
        """New row i is old row order[i]."""
        if order and len(order) < len(self._mask):
            self._select(torch.tensor(order, device=self._mask.device))

    def _select(self, rows: Tensor) -> None:
        """New row i is old row rows[i]. Every cache layer knows `reorder_cache`; the convolutions of hybrid models know no other way."""
        self._cache.reorder_cache(rows)
        self._mask = self._mask[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        policy = self._policy
        with policy.autocast():
            output = policy.model.base_model(
                input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache, use_cache=True
            )
        return policy.head().logits(output.last_hidden_state[:, -1], policy.compute_dtype)
