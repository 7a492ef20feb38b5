"""Which tokens are trained: R18 (the end token), R23 (those that were sampled, and no others)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import build_tiny_model
from tests.trainer.batches import choose_layout, dense_logprobs, make_batch, make_policy, make_prompts, sample
from tests.trainer.learners import dense_gradient, gradients_of_one_step, make_learner, relative_difference
from trainer.batch import Graded, Prompt
from trainer.data import collate
from trainer.tokens import load_tokenizer, render_prompt

END = 1
CPU = torch.device("cpu")
FORGETFUL = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{{ message['content'][-2:] }}{% else %}{{ message['content'] }}{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Shows of earlier answers the end only, as templates do that strip the thinking."""


@pytest.fixture(scope="module")
def pad_is_end(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, padded with its end token, as many models are."""
    folder = tmp_path_factory.mktemp("models") / "pad_is_end"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        given = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**given, "pad_token_id": END}))
    assert load_tokenizer(folder).pad_token_id == END
    return folder


def test_r18_a_row_counts_up_to_and_including_its_first_end_token(pad_is_end: Path) -> None:
    """MemGen#33: with pad == eos the mask was empty, and the loss was 0 for ever."""
    learner = make_learner(pad_is_end, group_size=8, max_completion_tokens=40)
    rollouts = sample(learner.policy, pad_is_end, make_prompts(pad_is_end), 8, max_completion_tokens=40)
    batch = collate([Graded(rollout, 1.0) for rollout in rollouts], learner.options, CPU)
    assert 0 < batch.truncated.sum() < len(rollouts)
    for row in range(len(rollouts)):
        counted = batch.completion_ids[row][batch.completion_mask[row]].tolist()
        assert END not in counted[:-1]
        assert (counted[-1] == END) is not bool(batch.truncated[row])
        assert len(counted) == 40 or counted[-1] == END
        assert batch.completion_mask[row, : len(counted)].all()


def test_r18_an_end_token_at_the_last_place_is_an_end_and_no_truncation(pad_is_end: Path) -> None:
    policy, prompts = make_policy(pad_is_end), make_prompts(pad_is_end)
    free = sample(policy, pad_is_end, prompts, 8, max_completion_tokens=40)
    ended = next(rollout for rollout in free if 2 < len(rollout.token_ids) < 40)
    limit = len(ended.token_ids)
    same = next(
        rollout
        for rollout in sample(policy, pad_is_end, prompts, 8, max_completion_tokens=limit)
        if (rollout.prompt.index, rollout.g) == (ended.prompt.index, ended.g)
    )
    assert (same.token_ids, same.finish_reason, same.text) == (ended.token_ids, "stop", ended.text)


def test_r18_the_end_token_is_learned_like_every_other(pad_is_end: Path) -> None:
    options = {"kl_coefficient": 0.0, "advantage_scale": "none", "loss_aggregation": "token_mean", "mismatch_correction": "none"}
    learner = make_learner(pad_is_end, wide=True, group_size=4, max_completion_tokens=40, max_grad_norm=1e9, **options)
    rollouts = sample(make_policy(pad_is_end), pad_is_end, make_prompts(pad_is_end), 4, max_completion_tokens=40)
    rewards = [float(rollout.finish_reason == "stop") for rollout in rollouts]
    batch = collate([Graded(rollout, reward) for rollout, reward in zip(rollouts, rewards, strict=True)], learner.options, CPU)
    batch.sampling_logprobs = batch.sampling_logprobs.double()
    weights = torch.zeros(batch.completion_mask.shape, dtype=torch.float64)
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    for row, rollout in enumerate(rollouts):
        baseline = sum(rewards[row - rollout.g : row - rollout.g + 4]) / 4
        weights[row, : len(rollout.token_ids)] = (rewards[row] - baseline) / num_tokens
    assert weights.any()
    expected = dense_gradient(learner, batch, weights)
    assert relative_difference(gradients_of_one_step(learner, batch), expected) <= 1e-6


def test_r23_every_trained_token_has_the_log_prob_it_was_sampled_with(tiny: Path) -> None:
    """trl#5224, prime-rl#1334, ART#726: the text was tokenized again. Here it cannot be: special tokens are not in it."""
    learner, tokenizer = make_learner(tiny, group_size=8, max_completion_tokens=24), load_tokenizer(tiny)
    rollouts = sample(learner.policy, tiny, make_prompts(tiny), 8)
    again = [tuple(tokenizer(rollout.text, add_special_tokens=False).input_ids) for rollout in rollouts]
    assert sum(ids not in (rollout.token_ids, rollout.token_ids[:-1]) for ids, rollout in zip(again, rollouts, strict=True)) > 3
    batch = collate([Graded(rollout, 1.0) for rollout in rollouts], learner.options, CPU)
    with torch.no_grad():
        expected = dense_logprobs(learner.policy.model, batch)
    mask = batch.completion_mask
    assert mask.sum() == sum(len(rollout.logprobs) for rollout in rollouts)
    assert (batch.sampling_logprobs - expected)[mask].abs().max() <= 1e-4


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_r23_a_second_turn_is_trained_behind_the_tokens_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    """The conversation is what was sampled, token by token, not what the template makes of its messages."""
    choose_layout(monkeypatch, packs)
    folder = build_tiny_model(tmp_path / "model", head_scale=12.0, template=FORGETFUL)
    policy, tokenizer = make_policy(folder), load_tokenizer(folder)
    first = sample(policy, folder, make_prompts(folder), 1, max_completion_tokens=10)
    reply = tuple(tokenizer("<user>go on<end><assistant>", add_special_tokens=False).input_ids)
    contexts = [rollout.prompt.token_ids + rollout.token_ids + reply for rollout in first]
    second = sample(policy, folder, [Prompt(index, ids, "", {}) for index, ids in enumerate(contexts)], 1, max_completion_tokens=10, step=1)
    groups = [(one.prompt.token_ids, [one.token_ids + reply + two.token_ids]) for one, two in zip(first, second, strict=True)]
    batch = make_batch(groups)
    sampled = torch.zeros(batch.completion_mask.shape)
    for row, (one, two) in enumerate(zip(first, second, strict=True)):
        begin, end = len(one.token_ids), len(one.token_ids) + len(reply)
        batch.completion_mask[row, begin:end] = False
        sampled[row, :begin] = torch.tensor(one.logprobs)
        sampled[row, end : end + len(two.logprobs)] = torch.tensor(two.logprobs)
    scored = policy.score(batch, 1.0).logprobs
    assert (scored - sampled)[batch.completion_mask].abs().max() <= 1e-4
    assert not scored[~batch.completion_mask].any()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first[0].text}, {"role": "user", "content": "go on"}]
    assert render_prompt(tokenizer, messages)[1] != contexts[0]
