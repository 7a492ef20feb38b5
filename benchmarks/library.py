"""What the plain library (transformers) does with a workload: its model in a precision, its `generate` with forced lengths."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

from benchmarks.workload import GROUP_SIZE, Workload, prompt_rows
from trainer.tokens import load_tokenizer, render_prompt


class ForcedLengths(LogitsProcessor):
    """Row i ends with the end token as token lengths[i]; before that the end token is never drawn. For one batch after another.

    Handicap: per token one assignment to a column; where rows end, which is known beforehand, one to those rows. Under 0.1 ms a token.
    """

    def __init__(self, lengths: tuple[int, ...], end_ids: list[int]) -> None:
        self._end_ids = end_ids
        self._ending = {length: torch.tensor([row for row, own in enumerate(lengths) if own == length]) for length in set(lengths)}
        self._longest = max(lengths)
        self._drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._drawn = self._drawn % self._longest + 1
        scores[:, self._end_ids] = -torch.inf
        if self._drawn in self._ending:
            rows = self._ending[self._drawn]
            scores[rows] = -torch.inf
            scores[rows, self._end_ids[0]] = 0.0
        return scores


def load_library_model(workload: Workload) -> Any:
    """Weights in bf16 where the workload holds everything in it, else in float32."""
    dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype)


class LibraryRollout:
    """The library's sampling of a workload's completions, as TRL calls it: dynamic cache, all rows until the last has ended."""

    def __init__(self, workload: Workload) -> None:
        tokenizer = load_tokenizer(workload.model)
        self._model = load_library_model(workload).eval()
        self._ids, self._mask = _pad_left([render_prompt(tokenizer, row["messages"])[1] for row in prompt_rows()])
        end = tokenizer.eos_token_id
        self._forced = [ForcedLengths(workload.lengths, [end])]
        self._settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": end, "pad_token_id": end}
        self._longest = max(workload.lengths)

    @torch.no_grad()
    def generate(self) -> Tensor:
        """-> [B, prompt + completion tokens]."""
        ids, mask = (tensor.repeat_interleave(GROUP_SIZE, 0) for tensor in (self._ids, self._mask))
        tokens: Tensor = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self._longest, logits_processor=self._forced, **self._settings
        )
        return tokens


def _pad_left(prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
