import pytest
import torch

from tests.trainer.batches import make_batch
from trainer.layout import group_shapes, num_tokens, pack, pad, plan_microbatches


def two_groups():
    return make_batch([([11, 12, 13], [[21, 22], [23]]), ([14], [[24, 25, 26], [27, 28]])])


def test_packed_row_holds_each_prompt_once_and_every_completion_behind_it():
    batch = two_groups()
    layout = pack(batch, group_shapes(batch), torch.float32)
    assert layout.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 14, 24, 25, 26, 27, 28]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 1, 2]]


def seen_by(layout) -> list[set[int]]:
    """For each token of a packed row the tokens that it sees, read out of the blocks."""
    reads = []
    for block in layout.sharing.blocks:
        count, length = block.queries.shape
        assert block.mask.shape[1:] == (1, length, block.keys.shape[1])
        assert block.mask.shape[0] in (1, count)
        for keys, mask in zip(block.keys, block.mask.expand(count, -1, -1, -1), strict=True):
            reads += [keys[row == 0].tolist() for row in mask[0]]
    queries = torch.cat([block.queries.flatten() for block in layout.sharing.blocks])
    assert queries[layout.sharing.order].tolist() == list(range(layout.input_ids.shape[1]))
    chosen = [reads[place] for place in layout.sharing.order.tolist()]
    assert all(len(set(keys)) == len(keys) for keys in chosen), "a token that is seen twice weighs double"
    return [set(keys) for keys in chosen]


def test_packed_tokens_see_the_prompt_and_their_own_completion_only():
    batch = two_groups()
    assert seen_by(pack(batch, group_shapes(batch), torch.float32)) == [
        {0},
        {0, 1},
        {0, 1, 2},
        {0, 1, 2, 3},
        {0, 1, 2, 3, 4},
        {0, 1, 2, 5},
        {6},
        {6, 7},
        {6, 7, 8},
        {6, 7, 8, 9},
        {6, 10},
        {6, 10, 11},
    ]


def test_packed_tokens_of_any_lengths_see_what_a_plain_row_of_prompt_and_completion_shows_them():
    lengths = [(3, [1, 40, 0, 17]), (70, [5, 130, 33]), (1, [16, 64, 2])]
    batch = make_batch([(range(100, 100 + prompt), [[7] * length for length in completions]) for prompt, completions in lengths])
    expected, start = [], 0
    for prompt, completions in lengths:
        shared = set(range(start, start + prompt))
        expected += [set(range(start, place + 1)) for place in sorted(shared)]
        start += prompt
        for length in completions:
            expected += [shared | set(range(start, place + 1)) for place in range(start, start + length)]
            start += length
    assert seen_by(pack(batch, group_shapes(batch), torch.float32)) == expected


def test_blocks_waste_less_than_the_work_they_do():
    """Lengths of one block differ by less than a factor of two, so that no product is padded to more than four times its pairs."""
    batch = make_batch([([1] * prompt, [[7] * length for length in range(17, 200, 13)]) for prompt in (20, 90, 300)])
    for block in pack(batch, group_shapes(batch), torch.float32).sharing.blocks:
        real = [len(set(row.tolist())) for row in block.queries]
        assert block.queries.shape[1] < 2 * min(real)


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


def test_plan_keeps_groups_whole_within_the_bound_and_misses_none():
    batch = make_batch([([1] * (2 + index % 5), [[7] * (1 + (index * row) % 9) for row in range(1, 4)]) for index in range(12)])
    groups = group_shapes(batch)
    plan = plan_microbatches(groups, 100, packs=True)
    rows = sorted(row for microbatch in plan for group in microbatch for row in group.rows)
    assert rows == list(range(36))
    assert all(num_tokens(microbatch, packs=True) <= 100 for microbatch in plan)
    assert len(plan) > 1


def test_a_group_above_the_bound_goes_alone():
    batch = make_batch([([1] * 50, [[7] * 50, [7] * 50]), ([1], [[7], [7]]), ([1] * 40, [[7] * 50, [7] * 50])])
    plan = plan_microbatches(group_shapes(batch), 16, packs=True)
    assert [[group.rows for group in microbatch] for microbatch in plan] == [[(0, 1)], [(4, 5)], [(2, 3)]]


def test_plan_depends_on_shapes_only():
    first = make_batch([([1, 2], [[3], [4, 5]]), ([6], [[7, 8, 9], [10]])])
    second = make_batch([([9, 9], [[9], [9, 9]]), ([9], [[9, 9, 9], [9]])])
    plans = [plan_microbatches(group_shapes(batch), 8, packs=True) for batch in (first, second)]
    assert plans[0] == plans[1]
