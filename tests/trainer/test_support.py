"""Sampling that leaves out tokens (top_k, top_p, min_p), and log-probs over what it left."""

import io
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.options import Options
from tests.trainer.batches import choose_layout, make_batch, make_policy, make_prompts, sample
from tests.trainer.runs import make_run_directory, read_metrics, read_samples, train_here
from trainer import rollout as rollout_module
from trainer import session as session_module
from trainer.batch import Batch, Graded, Support
from trainer.config import load_job
from trainer.data import collate
from trainer.engine_sampling import kept_ids, kept_tokens, sample_tokens
from trainer.random import Purpose

OFF: dict[str, Any] = {"top_k": None, "top_p": 1.0, "min_p": 0.0}
FILTERS: list[dict[str, Any]] = [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}]
VOCABULARY = 48


@pytest.fixture(params=["native", "generic"])
def engine_kind(request, monkeypatch):
    if request.param == "generic":
        monkeypatch.setattr(rollout_module, "is_native", lambda _: False)
    return request.param


def slowly_kept(logits: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float) -> set[int]:
    """One filter after the other, by sorting."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    total, reached, nucleus = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        if reached < top_p * total or top_p == 1.0:
            nucleus.append(token)
        reached += weights[token]
    return {token for token in nucleus if weights[token] >= min_p}


def sets_of(kept: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in kept]


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 300},
        {"top_k": 999},
        {"top_p": 0.01},
        {"top_p": 0.8},
        {"top_p": 0.999},
        {"min_p": 0.003},
        {"min_p": 0.3},
        {"top_k": 20, "top_p": 0.7},
        {"top_k": 3, "top_p": 0.99, "min_p": 0.001},
        {"top_p": 0.9, "min_p": 0.2},
    ],
)
def test_kept_tokens_are_those_of_the_filters_one_after_the_other(filters, temperature, has_ties):
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(3)) * 2
    if has_ties:
        logits = logits.round()
    kept = kept_tokens(logits, temperature, **{**OFF, **filters})
    assert sets_of(kept) == [slowly_kept(row, temperature, **{**OFF, **filters}) for row in logits.tolist()]


def test_top_p_is_a_share_of_what_top_k_left():
    """Of 0.4, 0.3, 0.2 and 0.1, top_k 3 leaves 0.9: two tokens are 0.78 of that, but only 0.7 of the whole."""
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert sets_of(kept_tokens(logits, 1.0, top_k=3, top_p=0.75, min_p=0.0)) == [{1, 3}]
    assert sets_of(kept_tokens(logits, 1.0, top_k=None, top_p=0.75, min_p=0.0)) == [{1, 2, 3}]


@pytest.mark.parametrize(("filters", "count"), [({"top_k": 4}, 4), ({"top_p": 0.3}, 3), ({"min_p": 0.99}, 10)])
def test_of_equally_likely_tokens_the_lower_ids_are_kept(filters, count):
    assert sets_of(kept_tokens(torch.zeros(1, 10), 0.7, **{**OFF, **filters})) == [set(range(count))]


def test_temperature_comes_before_the_filters():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert [len(sets_of(kept_tokens(logits, temperature, **{**OFF, "top_p": 0.55}))[0]) for temperature in (0.5, 1.0, 3.0)] == [1, 2, 2]
    assert [len(sets_of(kept_tokens(logits, temperature, **{**OFF, "min_p": 0.5}))[0]) for temperature in (0.5, 1.0, 3.0)] == [1, 2, 3]


def test_draws_are_the_inverse_cdf_over_the_kept_tokens_in_order_of_id():
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(1)) * 2
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = kept_tokens(logits, 0.7, top_k=40, top_p=0.9, min_p=0.01)
    tokens, logprobs = sample_tokens(logits, 0.7, uniforms, kept)
    expected = (logits.double() / 0.7).exp() * kept
    expected /= expected.sum(-1, keepdim=True)
    assert tokens.tolist() == [int((row.cumsum(-1) <= number).sum()) for row, number in zip(expected, uniforms, strict=True)]
    torch.testing.assert_close(logprobs.double(), expected.gather(1, tokens[:, None])[:, 0].log(), rtol=0, atol=1e-5)


def test_extreme_numbers_draw_the_first_and_the_last_kept_token():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)).expand(2, -1)
    kept = kept_tokens(logits, 1.0, **{**OFF, "top_p": 0.5})
    tokens, _ = sample_tokens(logits, 1.0, torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64), kept)
    assert tokens.tolist() == [int(kept_ids(kept)[0][0]), int(kept_ids(kept)[1][-1])]


def rows_of(support: Support) -> list[list[int]]:
    return [support.token_ids[start:end].tolist() for start, end in itertools.pairwise(support.offsets.tolist())]


def make_support(rows: list[list[int]]) -> Support:
    return Support.of([torch.tensor(row, dtype=torch.int32) for row in rows])


def test_ragged_rows_are_selected_padded_joined_and_masked_as_lists_are():
    rows = [[3, 7], [], [5], [0, 1, 6], []]
    support = make_support(rows)
    assert (support.offsets.tolist(), support.token_ids.tolist()) == ([0, 2, 2, 3, 6, 6], [3, 7, 5, 0, 1, 6])
    assert support.token_ids.dtype == torch.int32
    for order in ([4, 3, 0, 0, 1, 2], [1, 4], []):
        assert rows_of(support.select(torch.tensor(order, dtype=torch.int64))) == [rows[place] for place in order]
    assert rows_of(support.pad(7)) == [*rows, [], []]
    assert rows_of(Support.concatenate([support, make_support([[], [2]]), support])) == [*rows, [], [2], *rows]
    assert sets_of(support.mask(8)) == [set(row) for row in rows]
    assert support.mask(8).shape == (5, 8)


def test_supports_are_equal_by_what_they_hold():
    assert make_support([[3, 7], [5]]) == make_support([[3, 7], [5]])
    assert make_support([[3, 7], [5]]) != make_support([[3], [7, 5]])
    assert make_support([[3, 7], [5]]) != make_support([[3, 7], [6]])


def test_two_plain_tensors_are_all_there_is_to_save():
    support = make_support([[3, 7], [], [5]])
    file = io.BytesIO()
    torch.save(vars(support), file)
    file.seek(0)
    assert Support(**torch.load(file, weights_only=True)) == support


def collated(rollouts) -> Batch:
    return collate([Graded(rollout, 1.0) for rollout in rollouts], Options(), torch.device("cpu"))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_sampling_log_probs_and_the_policys_own_are_over_one_support(tiny, engine_kind, finetuning, filters):
    """Without the support the same rollouts would have a mean ratio well below 1."""
    policy = make_policy(tiny, finetuning=finetuning)
    with torch.no_grad():
        for parameter in policy.policy_parameters():
            parameter.add_(0.02 * torch.cos(torch.arange(parameter.numel())).view(parameter.shape))
        batch = collated(sample(policy, tiny, make_prompts(tiny), 6, temperature=0.6, **filters))
        mask = batch.completion_mask
        difference = (policy.score(batch, 0.6).logprobs - batch.sampling_logprobs)[mask]
        ignored = (policy.score(replace(batch, support=None), 0.6).logprobs - batch.sampling_logprobs)[mask]
    assert difference.abs().max() <= 1e-4
    assert abs(difference.exp().mean() - 1) <= 1e-4
    assert ignored.exp().mean() < 0.97


def test_bf16_stays_within_the_tolerance_although_it_would_keep_other_tokens(tiny, engine_kind):
    policy = make_policy(tiny, precision="bf16")
    batch = collated(sample(policy, tiny, make_prompts(tiny), 8, temperature=0.6, top_p=0.8))
    with torch.no_grad():
        difference = (policy.score(batch, 0.6).logprobs - batch.sampling_logprobs)[batch.completion_mask]
    assert 0 < difference.abs().mean() <= 0.05
    assert abs(difference.exp().mean() - 1) <= 0.01


def test_every_token_is_in_its_support_and_rows_follow_the_completion(tiny, engine_kind):
    rollouts = sample(make_policy(tiny), tiny, make_prompts(tiny), 6, temperature=0.6, max_rows=7, top_p=0.8)
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 2
    for rollout in rollouts:
        rows = rows_of(rollout.support)
        assert len(rows) == len(rollout.token_ids)
        assert all(token in row and row == sorted(set(row)) for token, row in zip(rollout.token_ids, rows, strict=True))
    batch = collated(rollouts)
    kept = iter(rows_of(batch.support))
    for rollout in rollouts:
        own = rows_of(rollout.support)
        assert [next(kept) for _ in range(batch.completion_mask.shape[1])] == own + [[]] * (batch.completion_mask.shape[1] - len(own))


def with_random_support(batch: Batch, generator: torch.Generator) -> Batch:
    """Some tokens at every position, the sampled one among them; none where the mask is 0."""
    rows = []
    for token, counts in zip(batch.completion_ids.flatten().tolist(), batch.completion_mask.flatten().tolist(), strict=True):
        others = torch.randperm(VOCABULARY, generator=generator)[: int(torch.randint(0, 12, (), generator=generator))]
        rows.append(sorted({token, *others.tolist()}) if counts else [])
    return replace(batch, support=make_support(rows))


def dense_scores(model, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [B, T] from whole logits, one row at a time, by a softmax over the listed tokens only."""
    assert batch.support is not None
    kept = rows_of(batch.support)
    length = batch.completion_mask.shape[1]
    logprobs, entropies = (torch.zeros(batch.completion_mask.shape, dtype=torch.float64) for _ in range(2))
    for b in range(len(batch.groups)):
        prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
        logits = model(input_ids=torch.cat([prompt, batch.completion_ids[b]])[None]).logits[0, len(prompt) - 1 :]
        for t in batch.completion_mask[b].nonzero()[:, 0].tolist():
            ids = kept[b * length + t]
            log_p = (logits[t, ids] / temperature).log_softmax(-1)
            logprobs[b, t] = log_p[ids.index(int(batch.completion_ids[b, t]))]
            entropies[b, t] = -(log_p.exp() * log_p).sum()
    return logprobs, entropies


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_scores_with_holes_in_the_mask_equal_the_dense_ones_in_any_selection(tiny, monkeypatch, packs):
    choose_layout(monkeypatch, packs)
    policy = make_policy(tiny, kl_coefficient=0.1)
    policy.model.double()
    policy._reference.double()
    batch = make_batch(
        [([3, 6, 7, 8, 1, 4], [[9, 10, 11, 1], [12, 1], [13, 14, 15, 16, 17, 18, 19]]), ([3, 20, 1, 4], [[21], [22, 23, 1], [24, 25]])]
    )
    batch.completion_mask[0, 1] = batch.completion_mask[2, 0] = batch.completion_mask[2, 3:5] = False
    batch = with_random_support(batch, torch.Generator().manual_seed(4))
    expected = dense_scores(policy.model, batch, 0.7)
    for rows in (torch.arange(6), torch.tensor([3, 4, 5]), torch.tensor([3, 4, 5, 0, 1, 2])):
        chosen = batch.select(rows)
        with torch.no_grad():
            scores = policy.score(chosen, 0.7)
        torch.testing.assert_close(scores.logprobs, expected[0][rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scores.entropy, expected[1][rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(policy.reference_logprobs(chosen, 0.7), scores.logprobs, rtol=1e-9, atol=1e-9)


def test_a_support_of_the_whole_vocabulary_changes_no_bit(tiny, engine_kind):
    policy = make_policy(tiny)
    prompts = make_prompts(tiny)
    free, whole = sample(policy, tiny, prompts, 3), sample(policy, tiny, prompts, 3, top_k=VOCABULARY)
    assert all(rollout.support is None for rollout in free)
    assert all(rows_of(rollout.support) == [list(range(VOCABULARY))] * len(rollout.token_ids) for rollout in whole)
    assert [replace(rollout, support=None) for rollout in whole] == free
    found = []
    for rollouts in (free, whole):
        policy.model.zero_grad()
        scores = policy.score(collated(rollouts), 0.8)
        (scores.logprobs + 0.1 * scores.entropy).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.policy_parameters()])
        found.append(torch.cat([scores.logprobs.flatten(), scores.entropy.flatten(), gradient]))
    assert torch.equal(*found)


def test_temperature_0_ignores_the_filters(tiny):
    policy = make_policy(tiny)
    greedy = {"temperature": 0.0, "purpose": Purpose.EVALUATION}
    plain, filtered = (sample(policy, tiny, make_prompts(tiny), 1, **greedy, **filters) for filters in ({}, FILTERS[-1]))
    assert plain == filtered
    assert all(rollout.support is None for rollout in filtered)


def test_draws_over_a_support_do_not_depend_on_what_else_is_in_the_batch(tiny, engine_kind):
    policy = make_policy(tiny)
    together, few = (sample(policy, tiny, make_prompts(tiny), 4, max_rows=rows, temperature=0.6, top_p=0.8) for rows in (256, 5))
    assert [(rollout.token_ids, rollout.support) for rollout in few] == [(rollout.token_ids, rollout.support) for rollout in together]


@pytest.mark.parametrize("filters", FILTERS[:3], ids=str)
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_has_no_mismatch_between_sampler_and_trainer(tmp_path: Path, algorithm, filters):
    """With two passes over the batch old log-probs are scored; with a KL term the reference is. Before the first update both agree."""
    folder = make_run_directory(
        tmp_path / "run",
        algorithm=algorithm,
        model={"hidden": 32, "head_scale": 12.0},
        max_steps=2,
        temperature=0.6,
        kl_coefficient=0.05,
        epochs_per_batch=2,
        **filters,
    )
    assert train_here(folder).final_checkpoint is not None
    first, last = (line.values for line in read_metrics(folder))
    assert max(abs(values["sampler_mismatch_kl"]) for values in (first, last)) <= 1e-6
    assert 0.1 < first["entropy"] < 2.0


@pytest.mark.parametrize(("purpose", "temperature"), [(Purpose.ROLLOUT, None), (Purpose.EVALUATION, 0.9)])
def test_the_options_of_a_job_reach_its_sampling_in_training_and_in_evaluation(tmp_path: Path, purpose, temperature):
    job = load_job(make_run_directory(tmp_path / "run", top_k=5, top_p=0.8, min_p=0.1))
    sampling = session_module.make_sampling(job, frozenset(), purpose, 0, temperature)
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (5, 0.8, 0.1)


def test_evaluation_samples_what_training_samples(tmp_path: Path):
    """With top_k 1 there is one completion per prompt, in training and in evaluation, whatever the random numbers."""
    model = {"hidden": 32, "head_scale": 12.0}
    folder = make_run_directory(tmp_path / "run", model=model, valid_rows=4, eval_samples=3, max_steps=2, learning_rate=1e-12, top_k=1)
    train_here(folder)
    by_prompt: dict[int, set[str]] = {}
    for line in [*read_samples(folder), *read_samples(folder, "valid")]:
        by_prompt.setdefault(line.prompt_index % 8, set()).add(line.completion)
    assert len(by_prompt) >= 4
    assert all(len(completions) == 1 for completions in by_prompt.values())
    assert all(line.values["entropy"] == 0.0 for line in read_metrics(folder))
    for line in read_metrics(folder, "valid"):
        assert line.values["valid_reward_mean"] == pytest.approx(line.values["valid_greedy_reward_mean"])
