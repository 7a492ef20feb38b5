"""What the demo asks for and what it must reach, per algorithm."""

from dataclasses import dataclass
from typing import Any

SEED = 7
NUM_HELD_OUT = 64
NUM_TRAINING = 1200
EVAL_SAMPLES = 4
"""Completions of each held-out row."""

COMMON: dict[str, Any] = {
    "finetuning": "full",
    "precision": "bf16",
    "batch_size": 8,
    "group_size": 8,
    "max_completion_tokens": 24,
    "temperature": 1.0,
    "eval_samples": EVAL_SAMPLES,
}


@dataclass(frozen=True)
class Plan:
    hyperparameters: dict[str, Any]
    least_rise: float
    """Of the held-out reward; below it the demo fails."""


PLANS = {
    "grpo": Plan({**COMMON, "learning_rate": 1e-5, "warmup_steps": 5, "kl_coefficient": 0.0, "max_steps": 40}, least_rise=0.25),
    "ppo": Plan(
        {**COMMON, "learning_rate": 1e-5, "warmup_steps": 5, "kl_coefficient": 0.0, "max_steps": 40, "value_model": "shared_backbone"},
        least_rise=0.10,
    ),
}


def hyperparameters(algorithm: str, steps: int | None) -> dict[str, Any]:
    """What the job is sent. It evaluates before the first step and after the last one only, and is too short for resume points."""
    chosen = dict(PLANS[algorithm].hyperparameters)
    if steps is not None:
        chosen["max_steps"] = steps
        chosen["warmup_steps"] = min(steps, chosen["warmup_steps"])
    return {**chosen, **dict.fromkeys(("eval_interval", "checkpoint_interval", "resume_point_interval"), chosen["max_steps"])}
