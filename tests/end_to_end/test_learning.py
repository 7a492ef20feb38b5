"""Every algorithm teaches a tiny model from scratch, and only because of the rewards: permuted across the batch they teach nothing.

The task: answer with the letter of the prompt, graded by the number of such letters over eight. An answer has at most eight
characters, with dapo sixteen. Runs are spread over two processes: thirty of them take about a minute and a half.
"""

import statistics
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.session
from core.options import Options
from core.presets import PRESETS
from core.run_directory import End
from tests.trainer.runs import make_run_directory, read_metrics, train_here
from trainer.advantages import Estimator, make_estimator
from trainer.batch import Batch, Estimate

TASK: dict[str, Any] = {
    "rows": 64,
    "model": {"hidden": 64},
    "batch_size": 8,
    "group_size": 8,
    "max_steps": 80,
    "learning_rate": 4e-3,
    "lr_schedule": "linear",
    "epochs_per_batch": 2,
    "minibatches_per_batch": 2,
    "kl_coefficient": "auto",
    "checkpoint_interval": 1000,
    "resume_point_interval": 1000,
}
"""Fits an algorithm to the task without touching what defines it. Several optimizer steps per batch: with one, nothing is ever clipped."""

AFFORDABLE_KL = {"kl_coefficient": 0.005}
"""In the reward. Eight right letters are 8 ln 48 = 31 nats away from the start: at the default of 0.04 they cost more than they earn."""

CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "ppo-separate": {**AFFORDABLE_KL, "value_learning_rate": 4e-3},
    "ppo-shared_backbone": {**AFFORDABLE_KL, "value_model": "shared_backbone", "value_coefficient": 0.5},
    # Room for eight letters before the penalty on the last fifth of the length, and time to learn to end first.
    "dapo": {"max_completion_tokens": 16, "max_steps": 120},
    "dr_grpo": {},
    "gspo": {},
    "rloo": AFFORDABLE_KL,
    "reinforce_pp": {},
    "cispo": {},
}
SEEDS = {case: (1, 2, 3) if case in ("grpo", "ppo-separate", "ppo-shared_backbone") else (1,) for case in CASES}
RUNS = [(case, seed) for case in CASES for seed in SEEDS[case]]


def preset_of(case: str) -> str:
    return case.partition("-")[0]


def permuting(options: Options) -> Estimator:
    """The estimator of `options` for rewards dealt out to the wrong completions, anew in each step."""
    estimator = make_estimator(options)
    generator = torch.Generator().manual_seed(0)

    def estimate(batch: Batch, kl_coefficient: float) -> Estimate:
        order = torch.randperm(len(batch.rewards), generator=generator)
        return estimator(replace(batch, rewards=batch.rewards[order]), kl_coefficient)

    return estimate


def reward_curve(folder: Path, case: str, seed: int, permuted: bool) -> list[float]:
    """Mean raw reward of each step. Runs in a process of its own, so that replacing the estimator touches nothing else."""
    trainer.session.make_estimator = permuting if permuted else make_estimator
    make_run_directory(folder, algorithm=preset_of(case), seed=seed, **{**TASK, **CASES[case]})
    outcome = train_here(folder)
    assert outcome.end is End.SUCCEEDED, outcome.message
    return [line.values["reward_mean"] for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int, bool], Future[list[float]]]]:
    base = tmp_path_factory.mktemp("learning")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield {
            (case, seed, permuted): pool.submit(reward_curve, base / f"{case}-{seed}-{permuted}", case, seed, permuted)
            for case, seed in RUNS
            for permuted in (False, True)
        }


def best_ten(curve: list[float]) -> float:
    """The highest mean over ten consecutive steps."""
    return max(statistics.fmean(curve[start : start + 10]) for start in range(len(curve) - 9))


def test_every_preset_is_among_the_cases() -> None:
    assert {preset_of(case) for case in CASES} == set(PRESETS)


@pytest.mark.parametrize(("case", "seed"), RUNS)
def test_the_reward_rises_from_under_015_to_07_and_not_by_chance(
    curves: dict[tuple[str, int, bool], Future[list[float]]], case: str, seed: int
) -> None:
    curve, control = (curves[case, seed, permuted].result() for permuted in (False, True))
    assert statistics.fmean(curve[:5]) < 0.15
    assert best_ten(curve) >= 0.7
    assert best_ten(control) < 0.25
