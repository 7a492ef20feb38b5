"""Every family against its own forward pass in float32, one whole row at a time: decoded natively, or by the library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from core.errors import InvalidRequest
from tests.tiny import build_tiny_tokenizer
from tests.trainer.batches import batch_of_rollouts, dense_logprobs, make_policy, make_prompts, sample
from trainer.engine_families import is_native

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
WINDOW = 7
GEMMA = {**SMALL, "head_dim": 16}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

NATIVE: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            rope_parameters={**LLAMA3_ROPE, "original_max_position_embeddings": 32},
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        )
    ),
    "llama with as many key heads": lambda: LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 4})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen2 with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**{**GEMMA, "num_key_value_heads": 1})),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GEMMA, **ALTERNATING, query_pre_attn_scalar=9, attn_logit_softcapping=2.0, final_logit_softcapping=4.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GEMMA, **ALTERNATING, query_pre_attn_scalar=9, rope_parameters=TWO_ROPES, attn_logit_softcapping=2.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2 with layer scales": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, n_inner=24, scale_attn_by_inverse_layer_idx=True, activation_function="relu")
    ),
}

GENERIC: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])),
    "llama with angles that follow the length": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    ),
}
MODELS = NATIVE | GENERIC
ATTENTION = ("q_proj", "v_proj")


@pytest.mark.parametrize("finetuning", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_sampled_log_probs_are_those_of_the_models_own_forward_pass(tmp_path: Path, name: str, finetuning: str) -> None:
    """Prompts of different lengths, some of which wait for rows that others leave."""
    save_model(name, tmp_path)
    targets = {"lora_targets": ATTENTION} if finetuning == "lora" and name in GENERIC else {}
    policy = make_policy(tmp_path, finetuning=finetuning, **targets)
    shake(policy.policy_parameters())
    assert is_native(policy.model) is (name in NATIVE)
    rollouts = sample(policy, tmp_path, make_prompts(tmp_path), 3, max_rows=6, end_token_ids=frozenset(range(0, 48, 6)))
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 2
    batch = batch_of_rollouts(rollouts)
    with torch.no_grad():
        difference = dense_logprobs(policy.model, batch) - batch.sampling_logprobs
    assert difference[batch.completion_mask].abs().max() <= 2e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapters_of_stacked_experts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    save_model(name, tmp_path)
    with pytest.raises(InvalidRequest, match=r"experts is a \w+Experts") as caught:
        make_policy(tmp_path, finetuning="lora")
    assert caught.value.param == "lora_targets"


def save_model(name: str, folder: Path) -> None:
    """Random weights of which none is 0 or 1, so that none can be left out unnoticed."""
    torch.manual_seed(0)
    model = MODELS[name]()
    shake(model.parameters())
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)


@torch.no_grad()
def shake(parameters: Any) -> None:
    for number, parameter in enumerate(parameters):
        parameter.add_(0.1 * torch.cos(torch.arange(parameter.numel()) + number).view(parameter.shape))
