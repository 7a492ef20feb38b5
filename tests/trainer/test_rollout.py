from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.errors import InvalidRequest
from tests.trainer.batches import batch_of_rollouts, make_policy, make_prompts, make_sampling, sample
from trainer import engine_native
from trainer import rollout as module
from trainer.engine_sampling import sample_tokens
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, fill_holes
from trainer.tokens import load_tokenizer


@pytest.fixture(params=["native", "generic"])
def engine_kind(request, monkeypatch):
    if request.param == "generic":
        monkeypatch.setattr(module, "is_native", lambda _: False)
    return request.param


def disagreement(policy, rollouts, temperature=1.0) -> torch.Tensor:
    batch = batch_of_rollouts(rollouts)
    with torch.no_grad():
        scored = policy.score(batch, temperature).logprobs
    return (scored - batch.sampling_logprobs)[batch.completion_mask]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_sampler_log_probs_equal_the_policy_forward_pass(tiny, engine_kind, finetuning, temperature):
    policy = make_policy(tiny, finetuning=finetuning)
    with torch.no_grad():
        for parameter in policy.policy_parameters():
            parameter.add_(0.02 * torch.cos(torch.arange(parameter.numel())).view(parameter.shape))
    rollouts = sample(policy, tiny, make_prompts(tiny), 5, temperature=temperature)
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 2
    assert disagreement(policy, rollouts, temperature).abs().max() <= 1e-4


def test_bf16_sampler_stays_within_the_tolerance(tiny, engine_kind):
    policy = make_policy(tiny, precision="bf16")
    difference = disagreement(policy, sample(policy, tiny, make_prompts(tiny), 8))
    assert difference.abs().mean() <= 0.05
    assert abs(difference.exp().mean() - 1) <= 0.01


def test_greedy_equals_the_library_generate(tiny, engine_kind):
    policy = make_policy(tiny)
    prompts = make_prompts(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for rollout in sample(policy, tiny, prompts, 1, temperature=0.0, purpose=Purpose.EVALUATION):
        ids = torch.tensor([rollout.prompt.token_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert list(rollout.token_ids) == expected.tolist()


def test_draws_do_not_depend_on_what_else_is_in_the_batch(tiny, engine_kind):
    """One row at a time, a few at a time with others taking their places, and all at once."""
    policy = make_policy(tiny)
    prompts = make_prompts(tiny)
    together = sample(policy, tiny, prompts, 4)
    few = sample(policy, tiny, prompts, 4, max_rows=5)
    alone = [rollout for prompt in prompts for rollout in sample(policy, tiny, [prompt], 4)]
    for other in (few, alone):
        assert [rollout.token_ids for rollout in other] == [rollout.token_ids for rollout in together]
        ours, theirs = (torch.tensor([number for rollout in rollouts for number in rollout.logprobs]) for rollouts in (together, other))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (16, 64), (256, 256)])
def test_padding_to_few_shapes_changes_no_draw(tiny, monkeypatch, rows, width):
    """As a GPU needs it, whose steps are recorded for each shape."""
    policy = make_policy(tiny)
    usual = sample(policy, tiny, make_prompts(tiny), 4)
    monkeypatch.setattr(engine_native, "_ROW_STEP", rows)
    monkeypatch.setattr(engine_native, "_WIDTH_STEPS", {"cpu": width})
    padded = sample(policy, tiny, make_prompts(tiny), 4)
    assert [rollout.token_ids for rollout in padded] == [rollout.token_ids for rollout in usual]
    assert disagreement(policy, padded).abs().max() <= 1e-4


def test_how_many_random_numbers_are_made_at_once_changes_no_draw(tiny, monkeypatch):
    policy = make_policy(tiny)
    usual = sample(policy, tiny, make_prompts(tiny), 4)
    monkeypatch.setattr(module, "UNIFORMS_AHEAD", 5)
    assert sample(policy, tiny, make_prompts(tiny), 4) == usual


def test_the_same_call_gives_the_same_bits_and_other_coordinates_other_draws(tiny):
    policy = make_policy(tiny)
    prompts = make_prompts(tiny)
    first = sample(policy, tiny, prompts, 3)
    assert sample(policy, tiny, prompts, 3) == first
    for change in ({"seed": 2}, {"step": 1}, {"round_": 1}, {"purpose": Purpose.EVALUATION}):
        assert [rollout.token_ids for rollout in sample(policy, tiny, prompts, 3, **change)] != [rollout.token_ids for rollout in first]


def test_completions_come_in_the_order_of_prompt_and_g_and_each_is_handed_over_once(tiny):
    policy = make_policy(tiny)
    prompts = make_prompts(tiny)
    handed = []
    checks = []
    engine = RolloutEngine(policy, load_tokenizer(tiny), "float32", max_rows=4)
    rollouts = engine.generate(prompts, 2, make_sampling(), on_finished=handed.append, check=lambda: checks.append(len(handed)))
    assert [(rollout.prompt.index, rollout.g) for rollout in rollouts] == [(prompt, g) for prompt in range(4) for g in range(2)]
    assert sorted(map(id, handed)) == sorted(map(id, rollouts))
    assert len(checks) >= 3
    assert handed != rollouts


def test_check_may_stop_the_call(tiny):
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RolloutEngine(make_policy(tiny), load_tokenizer(tiny), "float32").generate(
            make_prompts(tiny), 2, make_sampling(), on_finished=lambda _: None, check=stop
        )


def test_an_answer_ends_at_its_end_token_which_is_kept_and_not_shown(tiny):
    rollouts = sample(make_policy(tiny), tiny, make_prompts(tiny), 8, max_completion_tokens=60)
    ended = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert ended
    for rollout in rollouts:
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert (rollout.token_ids[-1] == 1) is (rollout.finish_reason == "stop")
        assert 1 not in rollout.token_ids[:-1]
        assert "<end>" not in rollout.text
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == 60


def test_a_stop_string_ends_the_answer_at_the_token_that_completes_it(tiny):
    policy = make_policy(tiny)
    prompts = make_prompts(tiny)
    free = sample(policy, tiny, prompts, 8, end_token_ids=frozenset())
    stop = free[0].text[3:5]
    tokenizer = load_tokenizer(tiny)
    stopped = sample(policy, tiny, prompts, 8, end_token_ids=frozenset(), stop=(stop,))
    for before, after in zip(free, stopped, strict=True):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        assert after.text == before.text.split(stop)[0]
        if after.finish_reason == "stop":
            whole = tokenizer.decode(after.token_ids, skip_special_tokens=True)
            assert whole == after.text + stop
    assert stopped[0].finish_reason == "stop"


def test_a_prompt_without_room_for_its_completion_is_refused(tiny):
    with pytest.raises(InvalidRequest) as caught:
        sample(make_policy(tiny), tiny, make_prompts(tiny), 1, max_completion_tokens=512)
    assert caught.value.code == "prompt_too_long"


def test_no_prompts_give_no_rollouts(tiny):
    assert sample(make_policy(tiny), tiny, [], 4) == []


def test_sampled_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, -2.0, float("-inf"), 0.5]).expand(20_000, -1)
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, logprobs = sample_tokens(logits, 0.7, uniforms)
    expected = (logits[0] / 0.7).softmax(-1)
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 20_000, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logprobs.exp(), expected[tokens])


def test_tokens_follow_the_uniform_number_in_order_of_token_id():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, _ = sample_tokens(logits, 1.0, uniforms)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    assert tokens.tolist() == [int((row <= number).sum()) for row, number in zip(cumulative, uniforms, strict=True)]


def test_the_extreme_numbers_never_pick_an_impossible_token():
    logits = torch.full((2, 300), float("-inf"))
    logits[:, 7], logits[:, 9] = 0.0, 1.0
    tokens, _ = sample_tokens(logits, 1.0, torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64))
    assert tokens.tolist() == [7, 9]


def test_rows_that_ended_are_replaced_by_the_last_ones():
    assert fill_holes([False, True, False, True, False]) == [0, 4, 2]
    assert fill_holes([True, True]) == []
    assert fill_holes([False, False, True]) == [0, 1]


def test_nothing_of_a_prompt_position_depends_on_its_place_in_the_call(tiny):
    policy = make_policy(tiny)
    prompts = make_prompts(tiny)
    moved = sample(policy, tiny, list(reversed(prompts)), 2)
    plain = {(rollout.prompt.index, rollout.g): rollout.token_ids for rollout in sample(policy, tiny, prompts, 2)}
    assert {(rollout.prompt.index, rollout.g): rollout.token_ids for rollout in moved} == plain
    other = sample(policy, tiny, [replace(prompts[0], index=99)], 2)
    assert other[0].token_ids != plain[0, 0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9}], ids=["free", "restricted"])
def test_sampling_and_learning_run_under_deterministic_algorithms_bit_for_bit(tiny, engine_kind, filters):
    policy = make_policy(tiny, precision="bf16")
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            rollouts = sample(policy, tiny, make_prompts(tiny), 4, **filters)
            policy.model.zero_grad()
            policy.score(batch_of_rollouts(rollouts), 1.0).logprobs.sum().backward()
            found.append((rollouts, torch.cat([parameter.grad.flatten() for parameter in policy.policy_parameters()])))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
