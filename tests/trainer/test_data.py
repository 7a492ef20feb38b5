import math
from pathlib import Path

import pytest
import torch

from core.errors import InvalidRequest
from core.options import Options
from tests.tiny import build_tiny_tokenizer
from tests.trainer.runs import letter_rows, write_rows
from trainer.batch import Graded, Prompt, Rollout
from trainer.data import PromptOrder, collate, load_prompts


def rows_of(order: PromptOrder, steps: range) -> list[list[int]]:
    return [order.rows(step) for step in steps]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (7, 7), (12, 5), (9, 8), (5, 1)])
def test_every_epoch_holds_each_row_once_and_no_step_holds_a_row_twice(num_rows: int, batch_size: int) -> None:
    steps = rows_of(PromptOrder(4, num_rows, batch_size), range(1, 4 * num_rows + 1))
    assert all(len(set(rows)) == batch_size for rows in steps)
    stream = [row for rows in steps for row in rows]
    for start in range(0, len(stream) - num_rows + 1, num_rows):
        assert sorted(stream[start : start + num_rows]) == list(range(num_rows))


def test_the_order_is_a_function_of_the_seed_and_the_step_alone() -> None:
    whole = rows_of(PromptOrder(4, 10, 3), range(1, 30))
    resumed = PromptOrder(4, 10, 3)
    assert [resumed.rows(step) for step in (17, 29, 2, 17)] == [whole[16], whole[28], whole[1], whole[16]]
    assert rows_of(PromptOrder(5, 10, 3), range(1, 30)) != whole


def test_epochs_are_shuffled_differently() -> None:
    order = PromptOrder(0, 30, 30)
    assert order.rows(1) != order.rows(2)
    assert order.rows(1) != list(range(30))


def test_a_prompt_that_is_too_long_is_named_with_its_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [*letter_rows(2), {"messages": [{"role": "user", "content": "x" * 50}]}])
    with pytest.raises(InvalidRequest, match=r"Line 3 of training_file has 53 prompt tokens; at most 52") as caught:
        load_prompts(tmp_path / "rows", "training_file", build_tiny_tokenizer(), 52, "default")
    assert (caught.value.code, caught.value.param) == ("prompt_too_long", "training_file")
    assert len(load_prompts(tmp_path / "rows", "training_file", build_tiny_tokenizer(), 53, "default")) == 3


def test_a_row_that_cannot_be_parsed_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"messages": [{"role": "user", "content": "a"}]}\n\n{"messages": []}\n')
    with pytest.raises(InvalidRequest, match="Line 3") as caught:
        load_prompts(tmp_path / "rows", "validation_file", build_tiny_tokenizer(), 99, "default")
    assert caught.value.code == "invalid_validation_file"


def test_prompts_carry_the_rendered_text_and_the_whole_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", letter_rows(2))
    prompts = load_prompts(tmp_path / "rows", "training_file", build_tiny_tokenizer(), 99, "default")
    assert [(prompt.index, prompt.text, prompt.item["letter"]) for prompt in prompts] == [
        (0, "<user>a<end><assistant>", "a"),
        (1, "<user>b<end><assistant>", "b"),
    ]


def graded(index: int, g: int, prompt: tuple[int, ...], tokens: tuple[int, ...], reward: float | None, finish: str = "stop") -> Graded:
    return Graded(Rollout(Prompt(index, prompt, "", {}), g, tokens, tuple(-0.5 * t for t in tokens), finish, ""), reward)


def test_collate_pads_prompts_left_and_completions_right_and_counts_only_graded_rows() -> None:
    rows = [
        graded(7, 0, (5, 6), (1, 2, 3), 0.5),
        graded(7, 1, (5, 6), (4,), None),
        graded(2, 0, (8, 9, 10), (1, 1), 2.0, "length"),
        graded(2, 1, (8, 9, 10), (2, 2), -1.0),
    ]
    batch = collate(rows, Options(), torch.device("cpu"))
    assert batch.prompt_ids.tolist() == [[0, 5, 6], [0, 5, 6], [8, 9, 10], [8, 9, 10]]
    assert batch.prompt_mask.tolist() == [[False, True, True]] * 2 + [[True] * 3] * 2
    assert batch.completion_ids.tolist() == [[1, 2, 3], [4, 0, 0], [1, 1, 0], [2, 2, 0]]
    assert batch.completion_mask.sum(1).tolist() == [3, 1, 2, 2]
    assert batch.sampling_logprobs[0].tolist() == [-0.5, -1.0, -1.5]
    assert batch.rewards.tolist() == [0.5, 0.0, 2.0, -1.0]
    assert batch.counts.tolist() == [True, False, True, True]
    assert batch.groups.tolist() == [0, 0, 1, 1]
    assert batch.truncated.tolist() == [False, False, True, False]


def test_masked_truncated_completions_do_not_count() -> None:
    rows = [graded(0, 0, (5,), (1,), 1.0, "length"), graded(0, 1, (5,), (1,), 1.0)]
    assert collate(rows, Options(mask_truncated=True), torch.device("cpu")).counts.tolist() == [False, True]


def test_log_probs_keep_float32_precision() -> None:
    rows = [Graded(Rollout(Prompt(0, (1,), "", {}), 0, (3,), (math.log(0.3),), "stop", ""), 1.0)]
    assert collate(rows, Options(), torch.device("cpu")).sampling_logprobs.item() == pytest.approx(math.log(0.3), abs=1e-7)
