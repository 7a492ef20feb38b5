import statistics

import pytest
import torch

from core.options import Options
from tests.trainer.handmade import group_advantages, make_batch, random_masks
from trainer.advantages import generalized_advantages, make_estimator, terminal_rewards
from trainer.batch import Batch

GAE = {"advantage_estimator": "gae", "value_model": "separate", "kl_coefficient": 0.0}


def test_gae_equals_the_sum_of_discounted_deltas_over_the_counted_tokens_only() -> None:
    generator = torch.Generator().manual_seed(3)
    masks = random_masks(6, 7, generator)
    values = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    rewards = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    ends = torch.randn(6, generator=generator, dtype=torch.float64)
    gamma, lambda_ = 0.97, 0.9
    found = generalized_advantages(rewards, values, ends, torch.tensor(masks, dtype=torch.bool), gamma, lambda_)
    for row, mask in enumerate(masks):
        places = [t for t, counted in enumerate(mask) if counted]
        v = [float(values[row, t]) for t in places] + [float(ends[row])]
        deltas = [float(rewards[row, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(places)]
        for i, t in enumerate(places):
            expected = sum((gamma * lambda_) ** (j - i) * deltas[j] for j in range(i, len(places)))
            assert float(found[row, t]) == pytest.approx(expected)
        assert all(found[row, t] == 0 for t in range(7) if not mask[t])


def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    values = torch.tensor([[0.3, -0.2, 0.9, 0.1]], dtype=torch.float64)
    batch = make_batch([2.0], [[1, 1, 1, 1]], [0], values=values)
    estimate = make_estimator(Options(**GAE, gamma=0.5, whiten_advantages=False))(batch, 0.0)
    assert estimate.advantages[0].tolist() == pytest.approx([0.25 - 0.3, 0.5 + 0.2, 1.0 - 0.9, 2.0 - 0.1])


def test_the_grade_lies_on_the_last_counted_token_of_each_row() -> None:
    batch = make_batch([0.5, 2.0], [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], [0, 0])
    assert terminal_rewards(batch).tolist() == [[0, 0, 0, 0.5, 0], [2.0, 0, 0, 0, 0]]


def test_two_lambdas_serve_advantages_and_returns_apart() -> None:
    values = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    batch = make_batch([3.0], [[1, 1, 1]], [0], values=values)
    options = Options(**GAE, gamma=0.9, gae_lambda=0.5, value_gae_lambda=1.0, whiten_advantages=False)
    estimate = make_estimator(options)(batch, options.kl_coefficient)
    assert estimate.advantages[0].tolist() == pytest.approx([0.9625, 1.25, 1.0])
    assert estimate.returns is not None
    assert estimate.returns[0].tolist() == pytest.approx([0.81 * 3, 0.9 * 3, 3.0])


def test_scale_none_divides_by_nothing() -> None:
    assert group_advantages([0.0, 1.0], 2, advantage_scale="none") == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("name", ["gae", "group", "batch"])
def test_a_batch_without_a_single_grade_yields_zeros(name: str) -> None:
    options = Options(advantage_estimator=name, value_model="separate" if name == "gae" else None, kl_coefficient=0.0)
    batch = make_batch([0.0, 0.0], [[1], [1]], [0, 0], counts=[False, False], values=torch.zeros(2, 1, dtype=torch.float64))
    estimate = make_estimator(options)(batch, options.kl_coefficient)
    assert not estimate.advantages.any()
    assert not estimate.batch_counts.any()


def test_permuting_groups_permutes_advantages() -> None:
    assert group_advantages([0.0, 1.0, 3.0, 9.0], 2)[:2] == group_advantages([3.0, 9.0, 0.0, 1.0], 2)[2:]


KL_ROWS = torch.tensor([[-0.5, -0.25, -1.0], [-2.0, -0.1, 5.0]], dtype=torch.float64)
REFERENCE_ROWS = torch.tensor([[-1.0, -0.5, -0.5], [-1.0, -0.6, -7.0]], dtype=torch.float64)


def test_kl_in_the_reward_is_taken_off_each_token_by_gae() -> None:
    options = Options(
        advantage_estimator="gae",
        value_model="separate",
        kl_coefficient=0.1,
        kl_estimator="k1",
        kl_placement="reward",
        whiten_advantages=False,
    )
    values = torch.zeros(2, 3, dtype=torch.float64)
    batch = make_batch([1.0, 2.0], [[1, 1, 1], [1, 1, 0]], [0, 1], values=values, old=KL_ROWS, reference=REFERENCE_ROWS)
    penalty = [[0.05, 0.025, -0.05], [-0.1, 0.05]]
    found = make_estimator(options)(batch, options.kl_coefficient).advantages
    assert found[0].tolist() == pytest.approx([1 - sum(penalty[0]), 1 - sum(penalty[0][1:]), 1 - penalty[0][2]])
    assert found[1].tolist() == pytest.approx([2 - sum(penalty[1]), 2 - penalty[1][1], 0.0])


def test_kl_in_the_reward_is_summed_per_completion_by_the_group_estimator() -> None:
    options = Options(kl_coefficient=0.1, kl_estimator="k1", kl_placement="reward", advantage_scale="none")
    batch = make_batch([1.0, 2.0], [[1, 1, 1], [1, 1, 0]], [0, 0], old=KL_ROWS, reference=REFERENCE_ROWS)
    rewards = [1 - 0.1 * (0.5 + 0.25 - 0.5), 2 - 0.1 * (-1.0 + 0.5)]
    mean = statistics.fmean(rewards)
    assert make_estimator(options)(batch, options.kl_coefficient).advantages[:, 0].tolist() == pytest.approx([r - mean for r in rewards])


def test_kl_in_the_reward_of_the_batch_estimator_is_what_is_still_to_come() -> None:
    options = Options(advantage_estimator="batch", kl_coefficient=0.1, kl_estimator="k1", kl_placement="reward")
    batch = make_batch([1.0, 2.0], [[1, 1, 1], [1, 1, 0]], [0, 1], old=KL_ROWS, reference=REFERENCE_ROWS)
    raw = [1 - 0.025, 1 + 0.025, 1 + 0.05, 2 + 0.05, 2 - 0.05]
    mean, deviation = statistics.fmean(raw), statistics.pstdev(raw)
    found = make_estimator(options)(batch, options.kl_coefficient).advantages
    expected = [(value - mean) / deviation for value in raw]
    assert [*found[0].tolist(), *found[1, :2].tolist()] == pytest.approx(expected, rel=1e-5)
    assert found[1, 2] == 0.0


BOOTSTRAP = {**GAE, "truncation_bootstrap": True, "gamma": 0.9, "gae_lambda": 0.5, "value_gae_lambda": 0.5, "whiten_advantages": False}


def cut_batch(grade: float, bootstrap: list[float] | None) -> Batch:
    """Two rows alike, of which the first was cut."""
    values = torch.tensor([[0.5, 1.0, 2.0]] * 2, dtype=torch.float64)
    batch = make_batch([grade, 3.0], [[1, 1, 1]] * 2, [0, 1], values=values)
    batch.truncated[0] = True
    batch.bootstrap_values = None if bootstrap is None else torch.tensor(bootstrap, dtype=torch.float64)
    return batch


@pytest.mark.parametrize("grade", [3.0, -50.0])
def test_a_cut_completion_ends_with_its_value_in_place_of_its_grade(grade: float) -> None:
    # delta_2 = 0 + 0.9*4 - 2 = 1.6; A_1 = 0.8 + 0.45*1.6 = 1.52; A_0 = 0.4 + 0.45*1.52 = 1.084. The other row as without the option.
    estimate = make_estimator(Options(**BOOTSTRAP))(cut_batch(grade, [4.0, 77.0]), 0.0)
    assert estimate.advantages[0].tolist() == pytest.approx([1.084, 1.52, 1.6])
    assert estimate.advantages[1].tolist() == pytest.approx([0.9625, 1.25, 1.0])
    assert estimate.returns is not None
    assert estimate.returns[0].tolist() == pytest.approx([1.584, 2.52, 3.6])


def test_without_the_option_a_cut_completion_is_over_and_has_its_grade() -> None:
    estimate = make_estimator(Options(**{**BOOTSTRAP, "truncation_bootstrap": False}))(cut_batch(3.0, None), 0.0)
    assert estimate.advantages[0].tolist() == estimate.advantages[1].tolist() == pytest.approx([0.9625, 1.25, 1.0])


def test_kl_in_the_reward_of_a_cut_completion_stays_beside_its_value() -> None:
    options = Options(**{**BOOTSTRAP, "kl_coefficient": 0.1, "kl_estimator": "k1", "kl_placement": "reward", "gamma": 1.0})
    batch = cut_batch(3.0, [4.0, 0.0])
    batch.old_logprobs, batch.reference_logprobs = KL_ROWS.clone(), KL_ROWS - 2.0
    assert make_estimator(options)(batch, 0.1).advantages[0, 2].item() == pytest.approx(4.0 - 2.0 - 0.1 * 2.0)


@pytest.mark.parametrize("name", ["gae", "group", "batch"])
def test_kl_in_the_reward_has_the_current_coefficient_and_not_the_first_one(name: str) -> None:
    given = {
        "advantage_estimator": name,
        "kl_estimator": "k1",
        "kl_placement": "reward",
        "value_model": "separate" if name == "gae" else None,
    }
    values = torch.zeros(2, 3, dtype=torch.float64)
    batch = make_batch([1.0, 2.0], [[1, 1, 1], [1, 1, 0]], [0, 0], values=values, old=KL_ROWS, reference=REFERENCE_ROWS)
    moved = make_estimator(Options(**given, kl_coefficient=0.1))(batch, 0.3).advantages
    assert torch.equal(moved, make_estimator(Options(**given, kl_coefficient=0.3))(batch, 0.3).advantages)
    assert not torch.equal(moved, make_estimator(Options(**given, kl_coefficient=0.1))(batch, 0.1).advantages)
