"""Log-probs without the tensor of all logits: R20 (equal to the dense path, for every kind of output layer), R21 (its memory).

R21's row for a GPU, where the allocator's peak is measured, needs a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from core.errors import InvalidRequest
from core.options import Options
from tests.tiny import build_tiny_tokenizer
from tests.trainer.batches import make_batch, make_policy
from tests.trainer.learners import relative_difference
from trainer import logprobs as logprobs_module
from trainer.batch import Batch, Support
from trainer.policy import Policy

VOCABULARY = 48
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GROUPS = [
    ([3, 6, 7, 8, 1, 4], [[9, 10, 11, 1], [12, 1], [13, 14, 15, 16, 17, 18, 19]]),
    ([3, 20, 1, 4], [[21], [22, 23, 1], [24, 25]]),
]


def soft_capped() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0))


def multiplied() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))


def divided() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=2.0))


def biased() -> PreTrainedModel:
    model = PhiForCausalLM(PhiConfig(**SMALL, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def dense_scores(model: Any, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) [B, T] from the model's own whole logits, one row at a time, over the support where there is one."""
    length = batch.completion_mask.shape[1]
    kept = torch.ones(batch.completion_mask.numel(), VOCABULARY, dtype=torch.bool)
    if batch.support is not None:
        kept = batch.support.mask(VOCABULARY)
    logprobs, entropies = [], []
    for row in range(len(batch.groups)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        ids = torch.cat([prompt, batch.completion_ids[row]])
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
        own = kept[row * length : (row + 1) * length] | ~batch.completion_mask[row][:, None]
        log_p = logits.masked_fill(~own, -1e9).log_softmax(-1)
        logprobs.append(log_p.gather(1, batch.completion_ids[row][:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p * own).sum(-1))
    mask = batch.completion_mask
    return torch.stack(logprobs) * mask, torch.stack(entropies) * mask


def with_support(batch: Batch) -> Batch:
    """Every token with eleven others; nothing where nothing counts."""
    rows = [
        torch.tensor(sorted({token, *range(token % 7, VOCABULARY, 4)}) if counts else [], dtype=torch.int32)
        for token, counts in zip(batch.completion_ids.flatten().tolist(), batch.completion_mask.flatten().tolist(), strict=True)
    ]
    batch.support = Support.of(rows)
    return batch


@pytest.mark.parametrize("restricted", [False, True], ids=["free", "restricted"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("make_model", [soft_capped, multiplied, divided, biased], ids=lambda make: make.__name__)
def test_r20_chunked_log_probs_entropies_and_gradients_equal_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any, temperature: float, restricted: bool
) -> None:
    """Liger-Kernel#1082, trl#7009 #7270, unsloth-zoo#890: a fused path that knew no soft cap, scale, bias or temperature."""
    monkeypatch.setattr(logprobs_module, "MAX_CHUNK_LOGITS", 5 * VOCABULARY)
    torch.manual_seed(0)
    make_model().save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    policy = make_policy(tmp_path)
    batch = with_support(make_batch(GROUPS)) if restricted else make_batch(GROUPS)
    scores = policy.score(batch, temperature)
    expected = dense_scores(policy.model, batch, temperature)
    weights = torch.linspace(-1, 1, len(batch.groups))[:, None]
    gradients = []
    for logprobs, entropies in ((scores.logprobs, scores.entropy), expected):
        loss = (weights * (logprobs + 0.3 * entropies)).sum()
        found = torch.autograd.grad(loss, policy.policy_parameters(), allow_unused=True)
        gradients.append([gradient for gradient in found if gradient is not None])
    torch.testing.assert_close(scores.logprobs, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.entropy, expected[1], rtol=0, atol=1e-4)
    assert relative_difference(*gradients) <= 1e-3


class Odd(LlamaForCausalLM):
    """Does something to its logits that no configuration tells."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits = output.logits.sin()
        return output


def test_r20_an_output_layer_that_is_not_understood_is_refused(tiny: Path) -> None:
    with pytest.raises(InvalidRequest, match="computes its logits in a way that this trainer does not know"):
        Policy(Odd(LlamaConfig(**SMALL)).eval(), Options(kl_coefficient=0.0), 1, torch.device("cpu"), tiny)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """The sizes of the tensors that the graph holds."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def test_r21_no_tensor_grows_with_tokens_times_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl#4013 (80 GB instead of 0.23 GB), trl#5349, verl#7553: the logits of all tokens at once, or kept for the backward pass."""
    vocabulary, chunk = 8192, 2**18
    monkeypatch.setattr(logprobs_module, "MAX_CHUNK_LOGITS", chunk)
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": vocabulary, "hidden_size": 8})).save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    policy = make_policy(tmp_path)
    largest = []
    for length in (32, 128, 256):
        batch = make_batch([([3, 1, 4], [list(range(length))])])
        with Largest() as seen, kept_for_backward() as kept:
            scores = policy.score(batch, 0.7)
            (scores.logprobs + 0.1 * scores.entropy).sum().backward()
        largest.append(seen.numbers)
        assert sum(kept) < length * vocabulary / 2
    assert largest == [chunk] * 3
