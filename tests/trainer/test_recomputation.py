from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from core.errors import InvalidRequest
from core.run_directory import End
from tests.tiny import build_tiny_model, build_tiny_tokenizer
from tests.trainer.batches import choose_layout, make_batch, make_policy
from tests.trainer.runs import make_run_directory, read_metrics, train_here
from trainer.policy import Policy
from trainer.recomputation import recompute_layers

GROUPS = [([3, 6, 7, 8, 1, 4], [[9, 10, 11, 1], [12, 1]]), ([3, 20, 1, 4], [[21], [22, 23, 24, 1]])]


def moved_policy(folder: Path, **options: Any) -> Policy:
    """A policy and a value model whose adapters, if they have any, differ from each other and from nothing."""
    if "value_model" in options:
        options["advantage_estimator"] = "gae"
    policy = make_policy(folder, **options)
    with torch.no_grad():
        for index, parameter in enumerate([*policy.policy_parameters(), *policy.value_parameters()]):
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel()) + index).view(parameter.shape))
    return policy


def gradients(policy: Policy) -> list[Tensor]:
    """Of log-probs, entropies and values together, in the policy's parameters and in the value model's."""
    with_values = policy.options.needs_values
    scores = policy.score(make_batch(GROUPS), 1.0, with_values=with_values)
    loss = (scores.logprobs * torch.linspace(-1, 1, 4)[:, None] + 0.1 * scores.entropy).sum()
    if scores.values is not None:
        loss = loss + scores.values.square().sum()
    loss.backward()
    found = [parameter.grad for parameter in [*policy.policy_parameters(), *policy.value_parameters()]]
    assert all(gradient is not None and bool(gradient.any()) for gradient in found)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("finetuning", ["full", "lora"])
@pytest.mark.parametrize("value", [{}, {"value_model": "shared_backbone"}, {"value_model": "separate"}], ids=["none", "shared", "separate"])
def test_gradients_are_bit_for_bit_those_of_kept_activations(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, packs: bool, finetuning: str, value: dict[str, Any]
) -> None:
    choose_layout(monkeypatch, packs)
    kept, recomputed = (
        gradients(moved_policy(tiny, finetuning=finetuning, gradient_checkpointing=choice, **value)) for choice in (False, True)
    )
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)


def test_gradients_under_autocast_are_bit_for_bit_the_same_too(tiny: Path) -> None:
    kept, recomputed = (gradients(moved_policy(tiny, precision="bf16", gradient_checkpointing=choice)) for choice in (False, True))
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)


def test_a_scoring_pass_and_a_pass_with_gradient_give_the_same_bits(tiny: Path) -> None:
    policy = moved_policy(tiny, gradient_checkpointing=True)
    with torch.no_grad():
        scored = policy.score(make_batch(GROUPS), 1.0).logprobs
    assert torch.equal(policy.score(make_batch(GROUPS), 1.0).logprobs, scored)


def test_dropout_stays_off_and_no_random_number_is_drawn(tmp_path: Path) -> None:
    """GPT-2's configuration asks for dropout in every layer."""
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    kept, recomputed = (gradients(moved_policy(tmp_path, gradient_checkpointing=choice)) for choice in (False, True))
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def saved_bytes(folder: Path, layers: int, **options: Any) -> int:
    """What the graph of one scoring pass keeps for its backward pass, weights apart."""
    policy = make_policy(build_tiny_model(folder, layers=layers), **options)
    weights = {parameter.data_ptr() for parameter in policy.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = policy.score(make_batch(GROUPS), 1.0)
    assert scores.logprobs.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_a_further_layer_keeps_its_input_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetuning: str) -> None:
    """A packed row of 21 tokens with a hidden size of 64, in float32; with kept activations a layer holds over 15 times that."""
    input_bytes = 21 * 64 * 4
    growth = {}
    for choice in (False, True):
        few, many = (saved_bytes(tmp_path / f"{layers}", layers, finetuning=finetuning, gradient_checkpointing=choice) for layers in (2, 4))
        growth[choice] = (many - few) / 2
    assert growth[True] == input_bytes
    assert growth[False] > 15 * input_bytes


def test_a_model_that_does_not_name_its_layers_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        recompute_layers(nn.Linear(2, 2))
    assert caught.value.param == "gradient_checkpointing"


def test_a_run_is_the_same_run_whether_activations_are_kept_or_computed_again(tmp_path: Path) -> None:
    digests = []
    for choice in (False, True):
        folder = make_run_directory(
            tmp_path / str(choice),
            algorithm="ppo",
            max_steps=2,
            finetuning="lora",
            lora_rank=2,
            group_size=2,
            gradient_checkpointing=choice,
        )
        assert train_here(folder).end is End.SUCCEEDED
        digests.append([line.digest for line in read_metrics(folder)])
    assert digests[0] == digests[1]
