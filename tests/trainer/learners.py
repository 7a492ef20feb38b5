"""A learner around the tiny model, made-up rollouts for it, and the gradients that it hands to its optimizers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.presets import resolve_options
from tests.trainer.batches import dense_logprobs
from trainer.advantages import make_estimator
from trainer.batch import Batch
from trainer.policy import Policy
from trainer.update import Learner

GROUPS, GROUP_SIZE, LENGTH = 4, 2, 6
REWARDS = [0.0, 1.0, 0.5, 1.0, 1.0, 0.0, 0.2, 0.9]
FULL = {"finetuning": "full", "precision": "float32", "group_size": GROUP_SIZE, "batch_size": GROUPS, "max_completion_tokens": LENGTH}
SEPARATE = {**FULL, "algorithm": "ppo", "kl_coefficient": 0.0}
SHARED = {**SEPARATE, "value_model": "shared_backbone"}


def make_learner(tiny: Path, *, algorithm: str = "grpo", wide: bool = False, total_steps: int = 10, **given: Any) -> Learner:
    """`wide`: every weight is float64."""
    options = resolve_options(algorithm, {**FULL, "learning_rate": 1e-3, **given})
    policy = Policy.load(tiny, options, 1, torch.device("cpu"))
    if wide:
        for model in (policy.model, policy._reference):
            if model is not None:
                model.double()
        for parameter in policy.value_parameters():
            parameter.data = parameter.data.double()
    return Learner(policy, options, 1, total_steps, lambda: None)


def make_rollouts(rewards: list[float] | None = None, seed: int = 0, num_groups: int = GROUPS, dtype: torch.dtype = torch.float32) -> Batch:
    """Random tokens of the tiny vocabulary; completions of 2 to 6 tokens. Without `rewards`: those above, over and over."""
    generator = torch.Generator().manual_seed(seed)
    rows = num_groups * GROUP_SIZE
    groups = torch.arange(num_groups).repeat_interleave(GROUP_SIZE)
    prompts = torch.randint(6, 48, (num_groups, 3), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (rows,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    return Batch(
        prompt_ids=prompts[groups],
        prompt_mask=torch.ones(rows, 3, dtype=torch.bool),
        completion_ids=torch.randint(6, 48, (rows, LENGTH), generator=generator) * mask,
        completion_mask=mask,
        sampling_logprobs=torch.full((rows, LENGTH), -3.0, dtype=dtype) * mask,
        rewards=torch.tensor(rewards or [REWARDS[row % len(REWARDS)] for row in range(rows)], dtype=torch.float64),
        counts=torch.ones(rows, dtype=torch.bool),
        groups=groups,
        truncated=torch.zeros(rows, dtype=torch.bool),
    )


def run_step(learner: Learner, batch: Batch, step: int = 1) -> dict[str, float]:
    plan = learner.plan(batch, step)
    scored = learner.score(batch, plan)
    return learner.update(scored, make_estimator(learner.options)(scored, learner.kl_coefficient), plan, step)


def state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.policy.trainable_state().items()}


def changed(before: dict[str, Tensor], learner: Learner, prefix: str) -> bool:
    after = learner.policy.trainable_state()
    return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(prefix))


def gradients_of_one_step(learner: Learner, batch: Batch) -> list[Tensor]:
    """The gradients that the optimizers are handed, in float64, one optimizer step after the other."""
    seen: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.extend(p.grad.double().clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None)

    for optimizer in learner._optimizers.values():
        optimizer.register_step_pre_hook(keep)
    run_step(learner, batch)
    return seen


def dense_gradient(learner: Learner, batch: Batch, weights: Tensor) -> list[Tensor]:
    """Gradient of -(weights [B, T] * log-probs).sum() from the model's whole logits, row by row."""
    logprobs = dense_logprobs(learner.policy.model, batch, learner.options.temperature)
    return list(torch.autograd.grad(-(weights * logprobs).sum(), learner.policy.policy_parameters()))


def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    one, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, expected))
    return float((one - other).norm() / other.norm())


def move_weights(learner_or_policy: Any, size: float = 0.02) -> None:
    """A change of all trained weights that no test confuses with noise."""
    policy = getattr(learner_or_policy, "policy", learner_or_policy)
    with torch.no_grad():
        for index, parameter in enumerate([*policy.policy_parameters(), *policy.value_parameters()]):
            parameter.add_(size * torch.sin(torch.arange(parameter.numel()) + index).view(parameter.shape))
