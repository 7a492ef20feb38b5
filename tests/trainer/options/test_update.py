"""Options of the optimizer, of the model and of the run's length, each through the loop: test_option_<name>."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.options import BASE_LEARNING_RATE
from core.run_directory import CHECKPOINTS, MODEL, RESUME_POINTS, published
from graders.grade import GradeRequest
from tests.trainer.options.observed import Observed, observe
from tests.trainer.runs import FunctionGrader
from trainer.layout import Layout
from trainer.policy import Policy

LORA: dict[str, Any] = {"finetuning": "lora", "lora_rank": 4}


def adam(seen: Observed, step: int = 1) -> list[dict[str, torch.Tensor]]:
    """The state of each weight of the policy's optimizer."""
    state: dict[int, dict[str, torch.Tensor]] = seen.learner(step)["optimizers"]["policy"]["state"]
    return list(state.values())


def test_option_learning_rate_is_adams_first_step(tmp_path: Path) -> None:
    for rate in (1e-4, 3e-3):
        seen = observe(tmp_path / str(rate), learning_rate=rate)
        assert seen.first("learning_rate") == rate
        assert seen.moved() == pytest.approx(rate, rel=1e-2)


def test_option_learning_rate_multiplier_scales_the_base_rate(tmp_path: Path) -> None:
    seen = observe(tmp_path, learning_rate=None, learning_rate_multiplier=7.0)
    assert seen.first("learning_rate") == pytest.approx(7 * BASE_LEARNING_RATE["full"])


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (1, 4), (2, 2)])
def test_option_epochs_per_batch_minibatches_per_batch_multiply_to_optimizer_steps(tmp_path: Path, epochs: int, minibatches: int) -> None:
    given = {"epochs_per_batch": epochs, "minibatches_per_batch": minibatches, "resume_point_interval": 1, "max_steps": 2}
    seen = observe(tmp_path, **given)
    assert {float(state["step"]) for state in adam(seen)} == {float(epochs * minibatches)}
    for epoch in range(epochs):
        rows = torch.cat([part for minibatch in seen.plans[0][epoch * minibatches : (epoch + 1) * minibatches] for part in minibatch])
        assert sorted(rows.tolist()) == list(range(32))


def test_option_microbatch_tokens_splits_the_work_and_not_the_result(tmp_path: Path) -> None:
    whole, split = (observe(tmp_path / str(tokens), microbatch_tokens=tokens) for tokens in (4096, 16))
    assert (len(whole.plans[0][0]), len(split.plans[0][0])) == (1, 4)
    assert split.first("loss") == pytest.approx(whole.first("loss"), abs=1e-6)
    assert split.first("grad_norm") == pytest.approx(whole.first("grad_norm"), rel=1e-4)


def test_option_max_grad_norm_bounds_what_reaches_the_optimizer(tmp_path: Path) -> None:
    """After one step Adam's first moment is a tenth of the gradient that it was given."""
    for bound in (1e-3, 1e3):
        seen = observe(tmp_path / str(bound), max_grad_norm=bound, resume_point_interval=1, max_steps=2)
        given = 10 * float(torch.stack([state["exp_avg"].norm() for state in adam(seen)]).norm())
        assert given == pytest.approx(min(bound, seen.first("grad_norm")), rel=1e-3)


def test_option_weight_decay_shrinks_every_weight_beside_the_step(tmp_path: Path) -> None:
    with_decay, without = (observe(tmp_path / str(decay), weight_decay=decay, learning_rate=1e-3).weights() for decay in (2.0, 0.0))
    before = load_file(tmp_path / "0.0" / MODEL / "model.safetensors")
    for name, weight in before.items():
        torch.testing.assert_close(with_decay[name], without[name] - 1e-3 * 2.0 * weight)


def test_option_warmup_steps_raises_the_rate_from_0(tmp_path: Path) -> None:
    seen = observe(tmp_path, warmup_steps=4, max_steps=6, learning_rate=1e-3)
    assert seen.curve("learning_rate") == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_option_lr_schedule_is_its_curve(tmp_path: Path, schedule: str) -> None:
    seen = observe(tmp_path, lr_schedule=schedule, max_steps=4, learning_rate=1e-3)
    left = [1.0, 0.75, 0.5, 0.25]
    shapes = {"constant": [1.0] * 4, "linear": left, "cosine": [0.5 - 0.5 * math.cos(math.pi * part) for part in left]}
    assert seen.curve("learning_rate") == pytest.approx([1e-3 * factor for factor in shapes[schedule]])


def test_option_finetuning_lora_trains_adapters_and_keeps_the_model(tmp_path: Path) -> None:
    full, lora = (observe(tmp_path / name, **given) for name, given in (("full", {}), ("lora", LORA)))
    folders = [seen.folder / CHECKPOINTS / "step_000001" for seen in (full, lora)]
    assert [(folder / "adapter_model.safetensors").exists() for folder in folders] == [False, True]
    assert [(folder / "model.safetensors").exists() for folder in folders] == [True, False]
    assert all("lora_B" not in name or float(weight.abs().max()) > 0 for name, weight in lora.weights("adapter_model.safetensors").items())


def test_option_lora_rank_is_the_inner_size_of_the_adapters(tmp_path: Path) -> None:
    for rank in (2, 5):
        seen = observe(tmp_path / str(rank), finetuning="lora", lora_rank=rank)
        weights = seen.weights("adapter_model.safetensors")
        assert {weight.shape[0] for name, weight in weights.items() if "lora_A" in name} == {rank}


def test_option_lora_alpha_scales_what_the_adapters_do(tmp_path: Path) -> None:
    """Adam's first step moves B by the learning rate alike, so that the policy moves in proportion to alpha."""
    small, large = (observe(tmp_path / str(alpha), **LORA, lora_alpha=alpha, learning_rate=1e-3) for alpha in (1.0, 8.0))
    assert large.first("kl_old") == pytest.approx(64 * small.first("kl_old"), rel=0.5)


def test_option_lora_targets_are_the_modules_with_adapters(tmp_path: Path) -> None:
    seen = observe(tmp_path, **LORA, lora_targets=["q_proj", "down_proj"])
    names = {name.split(".lora_")[0].split(".")[-1] for name in seen.weights("adapter_model.safetensors")}
    assert names == {"q_proj", "down_proj"}


def test_option_precision_bf16_rounds_in_products_and_keeps_float32_weights(tmp_path: Path) -> None:
    exact, rounded = (observe(tmp_path / name, precision=name) for name in ("float32", "bf16"))
    assert exact.first("sampler_mismatch_kl") < 1e-9
    assert rounded.first("sampler_mismatch_kl") < 0.05
    assert 1e-6 < abs(rounded.first("grad_norm") / exact.first("grad_norm") - 1) < 0.05
    assert {weight.dtype for weight in rounded.weights().values()} == {torch.float32}


def test_option_gradient_checkpointing_saves_activations_and_changes_no_bit(tmp_path: Path) -> None:
    digests, kept = [], []
    for is_on in (False, True):
        sizes: list[int] = []
        run = Policy._run

        def noted(self: Policy, backbone: Any, layout: Layout, sizes: list[int] = sizes, run: Any = run) -> torch.Tensor:
            def size(tensor: torch.Tensor) -> torch.Tensor:
                sizes.append(tensor.nbytes)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(size, lambda tensor: tensor):
                hidden: torch.Tensor = run(self, backbone, layout)
            return hidden

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Policy, "_run", noted)
            seen = observe(tmp_path / str(is_on), gradient_checkpointing=is_on, max_steps=2)
        digests.append(seen.curve("loss") + seen.curve("grad_norm"))
        kept.append(sum(sizes))
    assert digests[0] == digests[1]
    assert kept[1] < 0.5 * kept[0]


def test_option_deterministic_asks_torch_for_deterministic_kernels(tmp_path: Path) -> None:
    for is_on in (True, False):
        torch.use_deterministic_algorithms(not is_on)
        found: list[bool] = []

        def grade(request: GradeRequest, found: list[bool] = found) -> float:
            found.append(torch.are_deterministic_algorithms_enabled())
            return 0.5

        observe(tmp_path / str(is_on), FunctionGrader(grade), deterministic=is_on)
        assert set(found) == {is_on}
    torch.use_deterministic_algorithms(True)


def test_option_max_steps_is_the_length_of_the_run(tmp_path: Path) -> None:
    assert observe(tmp_path, max_steps=3).outcome.step == 3


def test_option_checkpoint_interval_is_the_distance_of_checkpoints(tmp_path: Path) -> None:
    seen = observe(tmp_path, checkpoint_interval=2, max_steps=5)
    assert [path.name for path in published(seen.folder, CHECKPOINTS)] == ["step_000002", "step_000004", "step_000005"]


def test_option_resume_point_interval_is_the_distance_of_resume_points(tmp_path: Path) -> None:
    seen = observe(tmp_path, resume_point_interval=2, max_steps=5)
    assert [path.name for path in published(seen.folder, RESUME_POINTS)] == ["step_000002", "step_000004"]


BEST_FIRST = (0.0, 0.9, 0.8, 0.1, 0.2, 0.3, 0.0)


def graded_by_step(request: GradeRequest) -> float:
    return BEST_FIRST[request.metadata["step"]]


@pytest.mark.parametrize(("keep", "steps"), [(1, [1, 5, 6]), (2, [1, 2, 5, 6])])
def test_option_keep_checkpoints_keeps_the_best_beside_the_newest(tmp_path: Path, keep: int, steps: list[int]) -> None:
    given = {"valid_rows": 1, "eval_interval": 1, "checkpoint_interval": 1, "max_steps": 6}
    seen = observe(tmp_path, FunctionGrader(graded_by_step), keep_checkpoints=keep, **given)
    assert [json.loads((path / "manifest.json").read_text())["step"] for path in published(seen.folder, CHECKPOINTS)] == steps


@pytest.mark.parametrize(("name", "value", "last"), [("target_reward", 0.85, 1), ("patience", 2, 3)])
def test_option_target_reward_patience_end_the_run_early(tmp_path: Path, name: str, value: float, last: int) -> None:
    given = {"valid_rows": 1, "eval_interval": 1, "max_steps": 6}
    assert observe(tmp_path, FunctionGrader(graded_by_step), **given, **{name: value}).outcome.step == last
