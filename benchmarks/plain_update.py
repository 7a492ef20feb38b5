"""An update as one would write it with the library alone: padded rows, logits of the whole vocabulary, autograd, AdamW."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.phases import PhaseClock
from benchmarks.workload import BETAS, LEARNING_RATE, LORA_ALPHA, LORA_RANK, Workload
from trainer.batch import Batch

CLIP = 0.2


class PlainUpdate:
    """Float32 weights; products in bf16 under autocast where the workload asks for it. One group of rows at a time."""

    def __init__(self, model: Any, workload: Workload, clock: PhaseClock) -> None:
        if workload.finetuning == "lora":
            config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
        self.model = model
        self._is_bf16 = workload.precision != "float32"
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True)
        self._loss = clock.timed("forward", self._loss_of_group)
        self._step = clock.timed("optimizer", self._clip_and_step)

    def update(self, batch: Batch, advantages: Tensor) -> None:
        """One optimizer step. `advantages` [B, T]."""
        self.accumulate(batch, advantages)
        self._step()

    def accumulate(self, batch: Batch, advantages: Tensor) -> None:
        """Adds the gradient of GRPO's loss, the mean over rows of the mean over tokens, to the parameters'."""
        for group in batch.groups.unique():
            rows = (batch.groups == group).nonzero()[:, 0]
            (self._loss(batch.select(rows), advantages[rows]) / len(batch.groups)).backward()

    def _loss_of_group(self, batch: Batch, advantages: Tensor) -> Tensor:
        """Sum over rows, cut to the group's own lengths."""
        length, width = int(batch.completion_mask.sum(1).max()), int(batch.prompt_mask.sum(1).max())
        mask, targets = batch.completion_mask[:, :length], batch.completion_ids[:, :length]
        ids = torch.cat([batch.prompt_ids[:, -width:], targets], 1)
        attention = torch.cat([batch.prompt_mask[:, -width:], mask], 1)
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
            logits = self.model(input_ids=ids, attention_mask=attention.long(), position_ids=positions, use_cache=False).logits
        logprobs = logits[:, width - 1 : -1].float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        ratio = (logprobs - logprobs.detach()).exp()
        surrogate = torch.minimum(ratio * advantages[:, :length], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[:, :length])
        return -(surrogate.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).sum()

    def _clip_and_step(self) -> None:
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
