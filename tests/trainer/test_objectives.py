import math

import pytest
import torch
from torch import Tensor

from core.options import Options
from tests.trainer.handmade import make_batch, random_masks
from trainer.batch import Estimate, Scores
from trainer.objectives import Denominators, make_objective
from trainer.tally import Tally

ROWS, LENGTH = 6, 5
BASE = {"kl_coefficient": 0.0, "max_completion_tokens": 7}


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64) for _ in range(5))  # type: ignore[return-value]


def loss_of(
    options: Options, rows: Tensor | None = None, seed: int = 0, sampling_shift: float = 0.0, tally: Tally | None = None
) -> tuple[Tensor, Tensor, Tally]:
    """The policy loss of `rows` (all by default) with the whole batch's denominators, the log-probs with gradient, and the tally."""
    logprobs, old, reference, advantages, entropy = drawn(seed)
    masks = random_masks(ROWS, LENGTH, torch.Generator().manual_seed(seed))
    old = logprobs + 0.3 * old
    batch = make_batch(
        [0.0] * ROWS,
        masks,
        [i // 2 for i in range(ROWS)],
        counts=[True, True, False, True, True, True],
        old=old,
        reference=logprobs + 0.5 * reference,
        sampling=old + sampling_shift,
    )
    estimate = Estimate(advantages, None, batch.counts)
    whole = Denominators.of(batch.token_counts)
    leaf = logprobs.clone().requires_grad_()
    chosen = torch.arange(ROWS) if rows is None else rows
    tally = Tally() if tally is None else tally
    scores = Scores(leaf[chosen], entropy[chosen])
    loss = make_objective(options).policy_loss(scores, batch.select(chosen), estimate.select(chosen), whole, options.kl_coefficient, tally)
    return loss, leaf, tally


def slow_loss(options: Options, per_token: "object", seed: int = 0) -> float:
    """The aggregation of `per_token(row, t)` written as loops over Python numbers."""
    masks = random_masks(ROWS, LENGTH, torch.Generator().manual_seed(seed))
    rows = [row for row in range(ROWS) if row != 2]
    sums = {row: [per_token(row, t) for t in range(LENGTH) if masks[row][t]] for row in rows}  # type: ignore[operator]
    if options.loss_aggregation == "token_mean":
        return sum(map(sum, sums.values())) / sum(map(len, sums.values()))
    if options.loss_aggregation == "sequence_mean":
        return sum(sum(values) / len(values) for values in sums.values()) / len(rows)
    return sum(map(sum, sums.values())) / (len(rows) * options.max_completion_tokens)


def clipped_by_hand(low: float, high: float, dual: float | None, seed: int = 0) -> "object":
    _, old, _, advantages, _ = drawn(seed)

    def per_token(row: int, t: int) -> float:
        ratio, a = math.exp(-0.3 * float(old[row, t])), float(advantages[row, t])
        loss = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        return min(loss, -dual * a) if dual is not None and a < 0 else loss

    return per_token


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("dual", [None, 1.2])
def test_clipped_surrogate_equals_a_slow_loop_for_every_aggregation(aggregation: str, dual: float | None) -> None:
    options = Options(**BASE, loss_aggregation=aggregation, clip_low=0.1, clip_high=0.3, clip_dual=dual, mismatch_correction="none")
    assert loss_of(options)[0].item() == pytest.approx(slow_loss(options, clipped_by_hand(0.1, 0.3, dual)))


def test_clip_fraction_counts_the_dual_clip_too() -> None:
    """Ratios 3 and 1.5 at a negative advantage: only the first is beyond the dual clip of 2."""
    old = torch.zeros(1, 2, dtype=torch.float64)
    batch = make_batch([0.0], [[1, 1]], [0], old=old)
    estimate = Estimate(torch.full_like(old, -1.0), None, batch.counts)
    leaf = torch.tensor([[3.0, 1.5]], dtype=torch.float64).log().requires_grad_()
    found = {}
    for dual in (None, 2.0):
        tally = Tally()
        objective = make_objective(Options(**BASE, loss_aggregation="token_mean", clip_dual=dual))
        loss = objective.policy_loss(Scores(leaf, old), batch, estimate, Denominators(2, 1), 0.0, tally)
        gradient = torch.autograd.grad(loss, leaf)[0]
        found[dual] = (tally.results()["clip_fraction"], gradient[0].tolist())
    assert found == {None: (0.0, pytest.approx([1.5, 0.75])), 2.0: (0.5, pytest.approx([0.0, 0.75]))}


def test_kl_and_entropy_terms_equal_a_slow_loop() -> None:
    options = Options(kl_coefficient=0.7, kl_estimator="k3", entropy_coefficient=0.2, loss_aggregation="token_mean")
    _, _, reference, _, entropy = drawn(0)
    surrogate = clipped_by_hand(0.2, 0.2, None)

    def per_token(row: int, t: int) -> float:
        difference = 0.5 * float(reference[row, t])
        kl = math.exp(difference) - 1 - difference
        return surrogate(row, t) + 0.7 * kl - 0.2 * float(entropy[row, t])  # type: ignore[operator]

    assert loss_of(options)[0].item() == pytest.approx(slow_loss(options, per_token))


OPTION_SETS = [
    {"loss_aggregation": "token_mean", "kl_coefficient": 0.1, "kl_estimator": "k2"},
    {"loss_aggregation": "sequence_mean", "kl_coefficient": 0.1},
    {"loss_aggregation": "fixed_length", "entropy_coefficient": 0.1, "kl_coefficient": 0.0},
    {"ratio_level": "sequence", "kl_coefficient": 0.0, "mismatch_correction": "reject", "mismatch_cap": 1.05},
    {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.1, "kl_coefficient": 0.0},
    {"clip_dual": 1.3, "kl_coefficient": 0.0, "mismatch_cap": 1.01},
]


@pytest.mark.parametrize("given", OPTION_SETS)
@pytest.mark.parametrize("sizes", [[2, 4], [2, 2, 2], [1] * 6])
def test_any_split_into_microbatches_gives_the_same_gradient_and_the_same_metrics(given: dict[str, object], sizes: list[int]) -> None:
    options = Options(**given)
    loss, leaf, tally = loss_of(options, sampling_shift=0.02)
    loss.backward()
    total, gradient, parts = 0.0, torch.zeros_like(leaf), Tally()
    for rows in torch.arange(ROWS).split(sizes):
        part, part_leaf, _ = loss_of(options, rows, sampling_shift=0.02, tally=parts)
        part.backward()
        total += part.item()
        gradient += part_leaf.grad
    assert total == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-14)
    assert parts.results() == pytest.approx(tally.results(), rel=1e-12)


def test_metrics_are_means_over_counted_tokens() -> None:
    found = loss_of(Options(**BASE))[2].results()
    _, old, _, advantages, entropy = drawn(0)
    masks = random_masks(ROWS, LENGTH, torch.Generator().manual_seed(0))
    places = [(row, t) for row in range(ROWS) for t in range(LENGTH) if masks[row][t] and row != 2]
    ratios = {place: math.exp(-0.3 * float(old[place])) for place in places}
    is_clipped = [(ratios[p] > 1.2 and advantages[p] > 0) or (ratios[p] < 0.8 and advantages[p] < 0) for p in places]
    assert found["entropy"] == pytest.approx(sum(float(entropy[place]) for place in places) / len(places))
    assert found["clip_fraction"] == pytest.approx(sum(is_clipped) / len(places))
    assert 0 < found["clip_fraction"] < 1
    assert found["ratio_max"] == pytest.approx(max(ratios.values()))


def test_rows_and_tokens_that_do_not_count_get_no_gradient() -> None:
    loss, leaf, _ = loss_of(Options(kl_coefficient=0.3, entropy_coefficient=0.1))
    loss.backward()
    masks = torch.tensor(random_masks(ROWS, LENGTH, torch.Generator().manual_seed(0)), dtype=torch.bool)
    assert leaf.grad is not None
    assert not leaf.grad[2].any()
    assert not leaf.grad[~masks].any()
    assert leaf.grad[0][masks[0]].any()


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_what_does_not_count_may_overflow_without_ruining_the_gradient(kind: str) -> None:
    reference = torch.tensor([[-1.0, 1e4], [1e4, 1e4]], dtype=torch.float64)
    old = torch.full((2, 2), -1.0, dtype=torch.float64)
    batch = make_batch([0.0] * 2, [[1, 0], [1, 1]], [0, 1], counts=[True, False], old=old - reference, reference=reference, sampling=old)
    estimate = Estimate(torch.zeros(2, 2, dtype=torch.float64), None, batch.counts)
    leaf = torch.full((2, 2), -2.0, dtype=torch.float64, requires_grad=True)
    objective = make_objective(Options(kl_estimator=kind, loss_aggregation="token_mean"))
    objective.policy_loss(Scores(leaf, old), batch, estimate, Denominators.of(batch.token_counts), 1.0, Tally()).backward()
    assert leaf.grad is not None
    assert leaf.grad.flatten().tolist() == [pytest.approx(leaf.grad[0, 0].item()), 0.0, 0.0, 0.0]
    assert leaf.grad[0, 0].item() == pytest.approx({"k2": -1.0, "k3": 1 - math.e}[kind])


def test_without_recorded_old_logprobs_the_ratio_is_1_and_the_gradient_is_that_of_reinforce() -> None:
    batch = make_batch([0.0], [[1, 1]], [0], sampling=torch.tensor([[-1.0, -2.0]], dtype=torch.float64))
    leaf = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    estimate = Estimate(torch.tensor([[2.0, -3.0]], dtype=torch.float64), None, batch.counts)
    tally = Tally()
    objective = make_objective(Options(**BASE, loss_aggregation="token_mean"))
    objective.policy_loss(Scores(leaf, torch.zeros_like(leaf)), batch, estimate, Denominators.of(batch.token_counts), 0.0, tally).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[-1.0, 1.5]]
    assert tally.results()["ratio_max"] == 1.0
    assert tally.results()["clip_fraction"] == 0.0


def weights_seen(options: Options, difference: list[list[float]]) -> list[float]:
    """-loss gradient per token with advantage 1 and ratio 1: the mismatch weight over the number of tokens."""
    old = torch.zeros(len(difference), len(difference[0]), dtype=torch.float64)
    batch = make_batch([0.0] * len(old), [[1] * old.shape[1]] * len(old), [0] * len(old), sampling=-torch.tensor(difference).double())
    leaf = old.clone().requires_grad_()
    estimate = Estimate(torch.ones_like(old), None, batch.counts)
    loss = make_objective(options).policy_loss(Scores(leaf, old), batch, estimate, Denominators.of(batch.token_counts), 0.0, Tally())
    loss.backward()
    assert leaf.grad is not None
    return (-leaf.grad * leaf.numel()).flatten().tolist()


def test_mismatch_truncate_caps_each_tokens_weight() -> None:
    options = Options(**BASE, loss_aggregation="token_mean", mismatch_cap=2.0)
    assert weights_seen(options, [[0.1, -0.5, 3.0]]) == pytest.approx([math.exp(0.1), math.exp(-0.5), 2.0])


def test_mismatch_reject_drops_sequences_but_keeps_the_denominator() -> None:
    options = Options(**BASE, loss_aggregation="token_mean", mismatch_correction="reject", mismatch_cap=2.0)
    assert weights_seen(options, [[0.5, -0.5], [2.0, 0.0], [-2.0, 0.0]]) == pytest.approx([1, 1, 0, 0, 0, 0])


def test_mismatch_weight_leaves_the_kl_term_alone() -> None:
    options = Options(kl_coefficient=1.0, kl_estimator="k2", loss_aggregation="token_mean")
    old = torch.zeros(1, 1, dtype=torch.float64)
    losses = []
    for sampling in (0.0, 5.0):
        batch = make_batch([0.0], [[1]], [0], reference=old + 2.0, sampling=old + sampling)
        estimate = Estimate(torch.zeros_like(old), None, batch.counts)
        scores = Scores(old, old)
        losses.append(make_objective(options).policy_loss(scores, batch, estimate, Denominators(1, 1), 1.0, Tally()).item())
    assert losses == [2.0, 2.0]


def test_cispo_weighs_the_log_prob_by_a_constant_and_never_cuts_a_gradient() -> None:
    old = torch.zeros(1, 2, dtype=torch.float64)
    batch = make_batch([0.0], [[1, 1]], [0], old=old)
    leaf = torch.tensor([[2.0, 0.1]], dtype=torch.float64, requires_grad=True)
    options = Options(
        surrogate="cispo", clip_low=1.0, clip_high=0.5, kl_coefficient=0.0, loss_aggregation="token_mean", mismatch_correction="none"
    )
    estimate = Estimate(torch.tensor([[1.0, 1.0]], dtype=torch.float64), None, batch.counts)
    make_objective(options).policy_loss(Scores(leaf, old), batch, estimate, Denominators(2, 1), 0.0, Tally()).backward()
    assert leaf.grad is not None
    assert leaf.grad[0].tolist() == pytest.approx([-1.5 / 2, -math.exp(0.1) / 2])


def test_value_loss_ignores_padding_and_divides_by_the_whole_minibatch() -> None:
    options = Options(advantage_estimator="gae", value_model="separate", kl_coefficient=0.0, value_clip=None)
    values = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    batch = make_batch([0.0] * 2, [[1, 0], [1, 1]], [0, 1], values=values)
    estimate = Estimate(values, torch.tensor([[1.0, 77.0], [2.0, 3.0]], dtype=torch.float64), batch.counts)
    loss = make_objective(options).value_loss(Scores(values, values, values), batch, estimate, Denominators.of(batch.token_counts))
    assert loss.item() == pytest.approx(0.5 * (1 + 4 + 9) / 3)
