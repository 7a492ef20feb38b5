"""PPO: R12 (padding), R13 (tool tokens), R14 (alignment and ends), R15 (the value head learns and lasts), R16 (value loss, whitening)."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.options import Options
from core.run_directory import CHECKPOINTS, CONTROL, Control, End, write_control
from graders.grade import GradeRequest
from tests.trainer import batches
from tests.trainer.batches import make_policy
from tests.trainer.handmade import make_batch, random_masks
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, train_here
from trainer.advantages import make_estimator, whiten
from trainer.batch import Batch, Estimate, Scores
from trainer.objectives import Denominators, make_objective
from trainer.policy import VALUE_WEIGHTS

GAE = {"advantage_estimator": "gae", "value_model": "separate", "kl_coefficient": 0.0, "whiten_advantages": False}


def estimate_of(batch: Batch, **options: Any) -> tuple[list[list[float]], list[list[float]]]:
    """(advantages, returns) as lists; one lambda for both."""
    both = {"gae_lambda": options.pop("lambda_", 1.0)}
    estimate = make_estimator(Options(**{**GAE, **both, "value_gae_lambda": both["gae_lambda"], **options}))(batch, 0.0)
    assert estimate.returns is not None
    return estimate.advantages.tolist(), estimate.returns.tolist()


@pytest.mark.parametrize("junk", [100.0, math.inf, math.nan])
@pytest.mark.parametrize("mask", [[1, 1, 0, 0], [1, 0, 1, 0]], ids=str)
def test_r12_values_where_the_mask_is_0_change_nothing(junk: float, mask: list[int]) -> None:
    """ROLL#447, verl#50: with values 0, 0, 100 the padding's 100 came back as an advantage of 5.7."""
    clean = torch.zeros(1, 4, dtype=torch.float64)
    dirty = clean.masked_fill(torch.tensor([mask]) == 0, junk)
    first, second = (estimate_of(make_batch([1.0], [mask], [0], values=values), lambda_=0.95) for values in (clean, dirty))
    assert first == second
    assert first[0][0] == pytest.approx([0.95 if t == 0 else float(counted) for t, counted in enumerate(mask)])


def test_r13_tokens_of_a_tool_cost_no_decay_and_take_no_reward() -> None:
    """miles#1827, VAGEN#8 #33: decay per position, and the grade on a last token that is not trained."""
    turns = make_batch([1.0], [[1, 1, 0, 0, 0, 1, 1, 0, 0]], [0], values=torch.full((1, 9), 0.25, dtype=torch.float64))
    plain = make_batch([1.0], [[1, 1, 1, 1]], [0], values=torch.full((1, 4), 0.25, dtype=torch.float64))
    places = [0, 1, 5, 6]
    for with_tool, without in zip(estimate_of(turns, gamma=0.9, lambda_=0.8), estimate_of(plain, gamma=0.9, lambda_=0.8), strict=True):
        assert [with_tool[0][t] for t in places] == pytest.approx(without[0])
        assert not any(with_tool[0][t] for t in range(9) if t not in places)
    delta, decay = 0.9 * 0.25 - 0.25, 0.9 * 0.8
    expected = [delta * (1 + decay + decay**2) + decay**3 * 0.75, delta * (1 + decay) + decay**2 * 0.75, delta + decay * 0.75, 0.75]
    assert estimate_of(plain, gamma=0.9, lambda_=0.8)[0][0] == pytest.approx(expected)


def test_r14_advantages_and_returns_equal_a_table_computed_by_hand() -> None:
    """spinningup#50: values and rewards shifted against each other by one.

    gamma 0.9, lambda 0.5, values 0.5 1.0 2.0, grade 3 on the last token:
    delta_2 = 3 - 2 = 1; delta_1 = 0.9*2 - 1 = 0.8; delta_0 = 0.9*1 - 0.5 = 0.4
    A_2 = 1; A_1 = 0.8 + 0.45*1 = 1.25; A_0 = 0.4 + 0.45*1.25 = 0.9625
    """
    batch = make_batch([3.0], [[1, 1, 1]], [0], values=torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64))
    advantages, returns = estimate_of(batch, gamma=0.9, lambda_=0.5)
    assert advantages[0] == pytest.approx([0.9625, 1.25, 1.0])
    assert returns[0] == pytest.approx([1.4625, 2.25, 3.0])


def test_r14_a_truncated_completion_ends_with_its_grade_and_not_with_a_value() -> None:
    """trl's padding_mask_p1: a value behind the end; where to bootstrap is an option and off by default."""
    values = torch.tensor([[0.5, 1.0, 2.0]] * 2, dtype=torch.float64)
    batch = make_batch([3.0, 3.0], [[1, 1, 1]] * 2, [0, 1], values=values)
    batch.truncated[1] = True
    advantages, returns = estimate_of(batch, gamma=0.9, lambda_=0.5)
    assert advantages[1] == advantages[0] == pytest.approx([0.9625, 1.25, 1.0])
    assert returns[1] == returns[0]


@pytest.mark.parametrize("kind", ["separate", "shared_backbone"])
def test_r14_a_value_is_read_at_the_state_that_predicts_its_token(tiny: Path, kind: str) -> None:
    groups = [([3, 6, 1, 4], [[9, 10, 1], [12, 1]]), ([3, 20, 1, 4], [[21], [22, 23, 24, 1]])]
    policy = make_policy(tiny, advantage_estimator="gae", value_model=kind)
    head = policy.value_parameters()[0]
    with torch.no_grad():
        head.copy_(torch.linspace(-1, 1, head.numel()))
    batch = batches.make_batch(groups)
    recorded, current = policy.values(batch)[0], policy.score(batch, 1.0, with_values=True).values
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    for row, (prompt, completion) in enumerate(rows):
        hidden = policy.model.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
        expected = hidden[len(prompt) - 1 : -1] @ head
        for values in (recorded, current):
            assert values is not None
            torch.testing.assert_close(values[row, : len(completion)], expected, rtol=0, atol=1e-4)


KINDS = [("full", "separate"), ("lora", "separate"), ("full", "shared_backbone"), ("lora", "shared_backbone")]


def value_weights(folder: Path, step: int) -> dict[str, Tensor]:
    path = folder / CHECKPOINTS / f"step_{step:06d}" / VALUE_WEIGHTS
    return load_file(path) if path.exists() else {}


def ppo_run(folder: Path, finetuning: str, kind: str) -> Path:
    given = {"finetuning": finetuning, "value_model": kind, "learning_rate": 1e-2, "group_size": 2, "lora_rank": 2}
    given = given if finetuning == "lora" else {name: value for name, value in given.items() if name != "lora_rank"}
    return make_run_directory(folder, algorithm="ppo", max_steps=3, checkpoint_interval=1, **given)


@pytest.mark.parametrize(("finetuning", "kind"), KINDS)
def test_r15_the_value_model_learns_in_every_step_and_every_checkpoint_holds_it(tmp_path: Path, finetuning: str, kind: str) -> None:
    """trl#3293 #1650: a head that no optimizer had, or that no checkpoint held."""
    folder = ppo_run(tmp_path / "run", finetuning, kind)
    train_here(folder)
    weights = [value_weights(folder, step) for step in (1, 2, 3)]
    assert weights[0].keys() >= {"head.weight", "head.bias"}
    assert any(name.startswith("backbone.") for name in weights[0]) is (kind == "separate")
    first, _, third = weights
    for before, after in itertools.pairwise(weights):
        assert not torch.equal(before["head.weight"], after["head.weight"])
    # The rest waits for the head, which starts at 0, and the A of an adapter for its B.
    assert [name for name in first if torch.equal(first[name], third[name])] == []
    assert all(line.values["value_grad_norm"] > 0 for line in read_metrics(folder))


@pytest.mark.parametrize(("finetuning", "kind"), KINDS)
def test_r15_a_resumed_value_model_goes_on_bit_for_bit(tmp_path: Path, finetuning: str, kind: str) -> None:
    """CoursIA#15256: the head began anew after a resume."""
    whole, resumed = (ppo_run(tmp_path / name, finetuning, kind) for name in ("whole", "resumed"))
    train_here(whole)

    def drain_in_step_3(request: GradeRequest) -> float:
        if request.metadata["step"] == 3:
            write_control(resumed, Control.DRAIN)
        return letter_fraction(request)

    assert train_here(resumed, FunctionGrader(drain_in_step_3)).step == 2
    (resumed / CONTROL).unlink()
    assert train_here(resumed).end is End.SUCCEEDED
    expected, found = value_weights(whole, 3), value_weights(resumed, 3)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize(
    ("new", "recorded", "target", "expected"),
    [
        (1.0, 0.0, 1.0, 0.5 * 0.8**2),  # moved far towards the target: clipped to 0.2, whose error is larger
        (0.1, 0.0, 1.0, 0.5 * 0.9**2),  # inside the clip
        (-1.0, 0.0, 1.0, 0.5 * 2.0**2),  # moved away: the unclipped error is larger and keeps its gradient
    ],
)
def test_r16_value_loss_takes_the_larger_of_clipped_and_unclipped_error(
    new: float, recorded: float, target: float, expected: float
) -> None:
    options = Options(advantage_estimator="gae", value_model="separate", kl_coefficient=0.0, value_clip=0.2)
    batch = make_batch([0.0], [[1]], [0], values=torch.tensor([[recorded]], dtype=torch.float64))
    estimate = Estimate(torch.zeros(1, 1).double(), torch.tensor([[target]], dtype=torch.float64), batch.counts)
    scores = Scores(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([[new]], dtype=torch.float64))
    assert make_objective(options).value_loss(scores, batch, estimate, Denominators(1, 1)).item() == pytest.approx(expected)


def test_r16_whitening_ignores_pads() -> None:
    """verl#50: mean and variance over padding too."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.tensor(random_masks(5, 6, generator), dtype=torch.bool)
    values = torch.randn(5, 6, generator=generator, dtype=torch.float64) * 3 + 7
    values[~mask] = 1e9
    white = whiten(values, mask)
    counted = white[mask].tolist()
    assert statistics.fmean(counted) == pytest.approx(0.0, abs=1e-12)
    assert statistics.pvariance(counted) == pytest.approx(1.0, abs=1e-6)
    assert not white[~mask].any()


def test_r16_whitening_of_equal_values_or_of_one_token_gives_0() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    assert whiten(torch.full((2, 2), 4.0), mask).tolist() == [[0, 0], [0, 0]]
    assert whiten(torch.tensor([[3.0]]), torch.tensor([[True]])).tolist() == [[0]]
    assert whiten(torch.tensor([[3.0]]), torch.tensor([[False]])).tolist() == [[0]]


def test_r16_a_batch_of_one_token_trains(tmp_path: Path) -> None:
    """stable-baselines3#1028: the deviation of a batch of one is NaN, and so was the loss."""
    folder = make_run_directory(tmp_path / "run", algorithm="ppo", rows=1, batch_size=1, group_size=1, max_completion_tokens=1, max_steps=2)
    assert train_here(folder).end is End.SUCCEEDED
    assert all(math.isfinite(line.values["value_loss"]) for line in read_metrics(folder))
