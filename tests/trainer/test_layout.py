import pytest
import torch

from tests.trainer.batches import make_batch
from trainer.layout import Cost, group_shapes, is_packing_cheaper, num_tokens, pack, pad, plan_microbatches

LINEAR_ONLY = Cost(per_token=1.0, per_pair=0.0)
ATTENTION_ONLY = Cost(per_token=0.0, per_pair=1.0)


def two_groups():
    return make_batch([([11, 12, 13], [[21, 22], [23]]), ([14], [[24, 25, 26], [27, 28]])])


def test_packed_row_holds_the_prompt_once_and_every_completion_behind_it():
    batch = two_groups()
    layout = pack(batch, group_shapes(batch), torch.float32)
    assert layout.input_ids.tolist() == [[11, 12, 13, 21, 22, 23], [14, 24, 25, 26, 27, 28]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 1, 2]]


def test_packed_tokens_see_the_prompt_and_their_own_completion_only():
    batch = two_groups()
    mask = pack(batch, group_shapes(batch), torch.float32).attention_mask
    seen = (mask[0, 0] == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert mask.min() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("is_packed", [True, False])
def test_sources_targets_and_places_are_aligned(is_packed):
    batch = two_groups()
    groups = group_shapes(batch)
    layout = pack(batch, groups, torch.float32) if is_packed else pad(batch, groups)
    flat = layout.input_ids.flatten()
    found = {}
    for source, target, place in zip(layout.sources.tolist(), layout.targets.tolist(), layout.places.tolist(), strict=True):
        assert batch.completion_ids.flatten()[place] == target
        found[target] = int(flat[source])
    assert found == {21: 13, 22: 21, 23: 13, 24: 14, 25: 24, 26: 25, 27: 14, 28: 27}


def test_a_hole_in_the_mask_is_context_but_is_not_scored():
    batch = make_batch([([11], [[21, 22, 23, 24]])])
    batch.completion_mask[0] = torch.tensor([True, False, True, False])
    layout = pad(batch, group_shapes(batch))
    assert layout.input_ids.tolist() == [[11, 21, 22, 23]]
    assert layout.targets.tolist() == [21, 23]
    assert layout.input_ids.flatten()[layout.sources].tolist() == [11, 22]
    assert layout.places.tolist() == [0, 2]


def test_sharing_wins_where_prompts_are_long_and_padding_where_packed_rows_are():
    long_prompt = group_shapes(make_batch([(range(1, 200), [[1]] * 8)]))
    long_completions = group_shapes(make_batch([([1], [range(1, 200)] * 8)]))
    assert is_packing_cheaper(long_prompt, Cost(per_token=100.0, per_pair=1.0))
    assert is_packing_cheaper(long_completions, LINEAR_ONLY)
    assert not is_packing_cheaper(long_completions, ATTENTION_ONLY)


def test_plan_keeps_groups_whole_within_the_bound_and_misses_none():
    batch = make_batch([([1] * (2 + index % 5), [[7] * (1 + (index * row) % 9) for row in range(1, 4)]) for index in range(12)])
    groups = group_shapes(batch)
    plan = plan_microbatches(groups, 100, LINEAR_ONLY)
    rows = sorted(row for microbatch in plan for group in microbatch for row in group.rows)
    assert rows == list(range(36))
    assert all(num_tokens(microbatch, packs=True) <= 100 for microbatch in plan)
    assert len(plan) > 1


def test_a_group_above_the_bound_goes_alone():
    batch = make_batch([([1] * 50, [[7] * 50, [7] * 50]), ([1], [[7], [7]]), ([1] * 40, [[7] * 50, [7] * 50])])
    plan = plan_microbatches(group_shapes(batch), 16, LINEAR_ONLY)
    assert [[group.rows for group in microbatch] for microbatch in plan] == [[(0, 1)], [(4, 5)], [(2, 3)]]


def test_plan_depends_on_shapes_only():
    first = make_batch([([1, 2], [[3], [4, 5]]), ([6], [[7, 8, 9], [10]])])
    second = make_batch([([9, 9], [[9], [9, 9]]), ([9], [[9, 9, 9], [9]])])
    plans = [plan_microbatches(group_shapes(batch), 8, LINEAR_ONLY) for batch in (first, second)]
    assert plans[0] == plans[1]
