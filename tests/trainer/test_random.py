import math

import numpy as np
import pytest

from trainer.random import Purpose, normals, permutation, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    """Source: Random123 1.14, tests/kat_vectors, philox 4x32 10."""
    assert tuple(int(word) for word in philox(counter, key)) == expected


def test_a_number_depends_on_its_own_counter_only():
    prompts, gs, ts = np.arange(50), np.arange(50) % 4, np.arange(50) * 3
    together = uniforms(7, Purpose.ROLLOUT, 5, 0, prompts, gs, ts)
    alone = [uniforms(7, Purpose.ROLLOUT, 5, 0, prompts[i], gs[i], ts[i]).item() for i in range(50)]
    assert together.tolist() == alone


def test_changing_any_one_coordinate_changes_the_number():
    base = {"seed": 1, "purpose": Purpose.ROLLOUT, "step": 1, "round_": 1, "prompts": 1, "gs": 1, "ts": 1}
    numbers = [uniforms(**base).item()]
    numbers += [uniforms(**{**base, name: 2 if name != "purpose" else Purpose.EVALUATION}).item() for name in base]
    assert len(set(numbers)) == len(base) + 1


def test_uniforms_are_uniform_and_below_one():
    numbers = uniforms(3, Purpose.ROLLOUT, 0, 0, np.arange(100_000), 0, 0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert 50 < chi_squared < 160


def test_normals_have_the_moments_of_the_standard_normal():
    numbers = normals(3, Purpose.INITIALISATION, 2, 100_001)
    assert numbers.shape == (100_001,)
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 1) < 0.02
    assert abs((numbers**4).mean() - 3) < 0.15
    within_one = (np.abs(numbers) < 1).mean()
    assert abs(within_one - math.erf(1 / math.sqrt(2))) < 0.01


def test_permutation_is_one_and_differs_between_steps():
    first, second = (permutation(1, Purpose.MINIBATCH, step, 0, 100) for step in (0, 1))
    assert sorted(first.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()
    assert first.tolist() == permutation(1, Purpose.MINIBATCH, 0, 0, 100).tolist()


def test_every_order_of_three_comes_up_about_equally_often():
    orders = [tuple(permutation(1, Purpose.DATA_ORDER, step, 0, 3).tolist()) for step in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(counts) < 260
    assert min(counts) > 140


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed"):
        uniforms(2**32, Purpose.ROLLOUT, 0, 0, 0, 0, 0)
