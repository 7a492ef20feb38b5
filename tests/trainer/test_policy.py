import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from core.errors import InvalidRequest, TrainingError
from tests.tiny import build_tiny_tokenizer
from tests.trainer.batches import batch_of_rollouts, choose_layout, dense_logprobs, make_batch, make_policy, make_prompts, sample

GROUPS = [
    ([3, 6, 7, 8, 1, 4], [[9, 10, 11, 1], [12, 1], [13, 14, 15, 16, 17, 18, 19]]),
    ([3, 20, 1, 4], [[21], [22, 23, 1], [24, 25]]),
    ([3, 6, 6, 6, 6, 6, 6, 6, 1, 4], [[30, 31, 1], [], [32]]),
]


def gradients(policy, batch, rows_of=None):
    """Gradient of a weighted sum of log-probs and entropies over `batch`, in the microbatches `rows_of`."""
    weights = torch.linspace(-1, 1, len(batch.groups), dtype=torch.float64)
    for parameter in policy.policy_parameters():
        parameter.grad = None
    for rows in rows_of or [torch.arange(len(batch.groups))]:
        scores = policy.score(batch.select(rows), 0.8)
        loss = (weights[rows, None] * (scores.logprobs + 0.1 * scores.entropy)).sum()
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.policy_parameters()])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_log_probs_equal_the_dense_forward_pass_packed_and_padded(tiny, monkeypatch, packs, temperature):
    choose_layout(monkeypatch, packs)
    policy = make_policy(tiny)
    policy.model.double()
    batch = make_batch(GROUPS)
    expected = dense_logprobs(policy.model, batch, temperature)
    torch.testing.assert_close(policy.score(batch, temperature).logprobs, expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_packed_and_padded_equal_the_dense_ones(tiny, monkeypatch):
    found = []
    for packs in (True, False):
        choose_layout(monkeypatch, packs)
        policy = make_policy(tiny)
        policy.model.double()
        policy.score(make_batch(GROUPS), 1.0).logprobs.sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in policy.policy_parameters()]))
    policy = make_policy(tiny)
    policy.model.double()
    dense_logprobs(policy.model, make_batch(GROUPS)).sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.policy_parameters()])
    for gradient in found:  # The library's norms compute in float32 whatever the weights are.
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def test_float32_gradients_are_within_1e_5_of_float64(tiny):
    batch = make_batch(GROUPS)
    narrow, wide = make_policy(tiny), make_policy(tiny)
    wide.model.double()
    difference = gradients(narrow, batch).double() - gradients(wide, batch)
    assert difference.norm() <= 1e-5 * gradients(wide, batch).norm()


def test_bf16_gradients_point_the_same_way(tiny):
    batch = make_batch(GROUPS)
    exact, rounded = gradients(make_policy(tiny), batch), gradients(make_policy(tiny, precision="bf16"), batch)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.999


def test_gradients_do_not_depend_on_the_microbatches(tiny):
    policy = make_policy(tiny)
    policy.model.double()
    batch = make_batch(GROUPS)
    whole = gradients(policy, batch)
    for microbatch_tokens in (16, 30, 4096):
        plan = policy.plan(batch, None, microbatch_tokens)
        torch.testing.assert_close(gradients(policy, batch, plan), whole, rtol=1e-9, atol=1e-11)
    assert len(policy.plan(batch, None, 16)) == 3


def test_plan_covers_exactly_the_rows_that_were_asked_for(tiny):
    plan = make_policy(tiny).plan(make_batch(GROUPS), torch.tensor([3, 4, 5, 6, 7, 8]), 16)
    assert sorted(torch.cat(plan).tolist()) == [3, 4, 5, 6, 7, 8]


def test_scoring_twice_gives_the_same_bits(tiny):
    policy = make_policy(tiny, precision="bf16")
    batch = make_batch(GROUPS)
    with torch.no_grad():
        first = policy.score(batch, 1.0).logprobs
    assert torch.equal(first, policy.score(batch, 1.0).logprobs.detach())


def test_tokens_outside_the_mask_change_nothing_and_get_no_score(tiny):
    policy = make_policy(tiny)
    batch = make_batch(GROUPS)
    other = replace(batch, completion_ids=torch.where(batch.completion_mask, batch.completion_ids, 5))
    scores = policy.score(other, 1.0)
    assert torch.equal(scores.logprobs, policy.score(batch, 1.0).logprobs)
    assert not scores.logprobs[~batch.completion_mask].any()
    assert not scores.entropy[~batch.completion_mask].any()


def test_lora_starts_as_the_base_and_its_reference_stays_the_base(tiny):
    base, policy = make_policy(tiny), make_policy(tiny, finetuning="lora", kl_coefficient=0.1)
    batch = make_batch(GROUPS)
    before = base.score(batch, 1.0).logprobs.detach()
    assert torch.equal(policy.score(batch, 1.0).logprobs.detach(), before)
    _move(policy)
    assert (policy.score(batch, 1.0).logprobs - before).abs().max() > 1e-2
    torch.testing.assert_close(policy.reference_logprobs(batch, 1.0), before, rtol=0, atol=0)


def test_full_reference_stays_where_training_began(tiny):
    policy = make_policy(tiny, kl_coefficient=0.1)
    batch = make_batch(GROUPS)
    before = policy.score(batch, 1.0).logprobs.detach()
    _move(policy)
    torch.testing.assert_close(policy.reference_logprobs(batch, 1.0), before, rtol=0, atol=0)
    with pytest.raises(TrainingError, match="kl_coefficient"):
        make_policy(tiny).reference_logprobs(batch, 1.0)


def test_lora_adapters_learn_after_the_reference_was_asked(tiny):
    policy = make_policy(tiny, finetuning="lora", kl_coefficient=0.1)
    batch = make_batch(GROUPS)
    scores = policy.score(batch, 1.0)
    policy.reference_logprobs(batch, 1.0)
    scores.logprobs.sum().backward()
    assert all(parameter.requires_grad for parameter in policy.policy_parameters())
    assert all(parameter.grad is not None for parameter in policy.policy_parameters())


def test_loading_and_adapter_initialisation_use_no_other_generator(tiny):
    states = (torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    policy = make_policy(tiny, finetuning="lora", advantage_estimator="gae", value_model="separate")
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    a = [parameter for name, parameter in policy.trainable_state().items() if "lora_A" in name and name.startswith("policy.")]
    assert all(0.7 < tensor.std() * (3 * tensor.shape[1]) ** 0.5 < 1.3 for tensor in a)
    assert len({tensor[0, 0].item() for tensor in a}) == len(a)


def test_saved_full_model_loads_as_a_hugging_face_folder_with_the_same_log_probs(tiny, tmp_path):
    policy = make_policy(tiny)
    _move(policy)
    batch = make_batch(GROUPS)
    assert policy.save(tmp_path / "saved") == "full"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(dense_logprobs(loaded, batch), policy.score(batch, 1.0).logprobs, rtol=0, atol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template


def test_saved_adapter_on_the_base_gives_the_same_log_probs(tiny, tmp_path):
    policy = make_policy(tiny, finetuning="lora")
    _move(policy)
    batch = make_batch(GROUPS)
    assert policy.save(tmp_path / "saved") == "lora"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "saved")
    torch.testing.assert_close(dense_logprobs(loaded, batch), policy.score(batch, 1.0).logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_saved_files_do_not_depend_on_the_directory_of_the_base(tiny, tmp_path, finetuning):
    saved = []
    for name in ("here", "there"):
        base = shutil.copytree(tiny, tmp_path / name / "model")
        make_policy(base, finetuning=finetuning).save(tmp_path / name / "saved")
        saved.append({path.name: path.read_bytes() for path in (tmp_path / name / "saved").iterdir()})
    assert saved[0] == saved[1]
    assert not any(str(tmp_path).encode() in content for content in saved[0].values())


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_trainable_state_moves_between_policies(tiny, finetuning):
    options = {"finetuning": finetuning, "advantage_estimator": "gae", "value_model": "separate"}
    moved, fresh = make_policy(tiny, **options), make_policy(tiny, **options)
    _move(moved)
    fresh.load_trainable_state({name: tensor.clone() for name, tensor in moved.trainable_state().items()})
    batch = make_batch(GROUPS)
    ours, theirs = (policy.score(batch, 1.0, with_values=True) for policy in (fresh, moved))
    assert torch.equal(ours.logprobs, theirs.logprobs)
    assert torch.equal(ours.values, theirs.values)
    with pytest.raises(TrainingError) as caught:
        fresh.load_trainable_state(make_policy(tiny).trainable_state())
    assert caught.value.code == "resume_mismatch"


def test_a_folder_that_lacks_weights_is_refused(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(TrainingError) as caught:
        make_policy(tmp_path)
    assert caught.value.code == "model_incomplete"


def test_lora_on_the_output_head_is_refused(tiny):
    with pytest.raises(InvalidRequest) as caught:
        make_policy(tiny, finetuning="lora", lora_targets=("lm_head",))
    assert caught.value.param == "lora_targets"


def test_families_that_take_no_packed_rows_are_scored_padded(tmp_path):
    """GPT-2 takes our mask; a sliding window would be lost in it."""
    windowed = MistralForCausalLM(
        MistralConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=4,
            max_position_embeddings=128,
        )
    )
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    batch = make_batch(GROUPS)
    for name, model in (("mistral", windowed), ("gpt2", learned)):
        model.save_pretrained(tmp_path / name)
        build_tiny_tokenizer().save_pretrained(tmp_path / name)
        policy = make_policy(tmp_path / name)
        torch.testing.assert_close(policy.score(batch, 0.7).logprobs, dense_logprobs(policy.model, batch, 0.7), rtol=0, atol=1e-5)
    assert policy._packs is not make_policy(tmp_path / "mistral")._packs


def test_end_token_is_scored_although_padding_may_be_the_same_token(tiny):
    policy = make_policy(tiny)
    batch = make_batch([([3, 6, 1, 4], [[7, 1], [8, 9, 10, 1]])])
    batch.completion_ids[0, 2:] = 1
    scores = policy.score(batch, 1.0).logprobs
    torch.testing.assert_close(scores, dense_logprobs(policy.model, batch), rtol=0, atol=1e-5)
    assert scores[0, 1] != 0
    assert scores[0, 2] == 0


def test_scores_of_rollouts_are_those_of_their_own_rows_however_selected(tiny):
    policy = make_policy(tiny)
    batch = batch_of_rollouts(sample(policy, tiny, make_prompts(tiny), 3))
    whole = policy.score(batch, 1.0).logprobs
    rows = torch.tensor([6, 7, 8])
    torch.testing.assert_close(policy.score(batch.select(rows), 1.0).logprobs, whole[rows], rtol=0, atol=1e-5)


def _move(policy) -> None:
    """A change of all trained weights that no test confuses with noise."""
    with torch.no_grad():
        for index, parameter in enumerate([*policy.policy_parameters(), *policy.value_parameters()]):
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel()) + index).view(parameter.shape))
