"""How good the policy is on the validation rows: the same rows and the same draws each time, under the training distribution."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from core.options import Options
from trainer.batch import Graded, Prompt
from trainer.grading import GradingService
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, Sampling

NORMAL_95 = 1.96
GREEDY_TEMPERATURE = 0.0


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    graded: list[Graded]
    """`eval_samples` completions of each row, without the greedy ones."""


class Evaluator:
    """Samples `eval_samples` completions of every validation row, and one greedy one, and has them graded."""

    def __init__(
        self,
        prompts: list[Prompt],
        engine: RolloutEngine,
        grading: GradingService,
        options: Options,
        sampling: Callable[..., Sampling],
        threshold: float,
    ) -> None:
        self.prompts = prompts
        self._engine, self._grading, self._options, self._sampling, self._threshold = engine, grading, options, sampling, threshold

    def evaluate(self, step: int, check: Callable[[], None], check_waiting: Callable[[], None]) -> Evaluation:
        """After `step` steps. Draws are those of step 0 at every evaluation, so that scores differ by the weights alone."""

        def graded(purpose: str, num_samples: int, temperature: float) -> list[Graded]:
            sampling = self._sampling(Purpose.EVALUATION, 0, temperature=temperature)
            with self._grading.open(purpose, step) as verdicts:
                rollouts = self._engine.generate(self.prompts, num_samples, sampling, on_finished=verdicts.add, check=check)
                return verdicts.collect(rollouts, check_waiting)

        sampled = graded("evaluation", self._options.eval_samples, self._options.temperature)
        greedy = graded("greedy", 1, GREEDY_TEMPERATURE)
        return Evaluation(summarise(sampled, greedy, self._options.eval_samples, self._threshold), sampled)


def summarise(sampled: list[Graded], greedy: list[Graded], num_samples: int, threshold: float) -> dict[str, float]:
    """Validation metrics. `sampled` is ordered by row; means are over graded completions, the interval over rows."""
    rewards = [entry.reward for entry in sampled if entry.reward is not None]
    greedy_rewards = [entry.reward for entry in greedy if entry.reward is not None]
    rows = [[e.reward for e in sampled[i : i + num_samples] if e.reward is not None] for i in range(0, len(sampled), num_samples)]
    graded_rows = [row for row in rows if row]
    metrics = {
        "valid_reward_half_width": half_width([statistics.fmean(row) for row in graded_rows]),
        "valid_completion_tokens_mean": statistics.fmean(len(entry.rollout.token_ids) for entry in sampled),
        "valid_grader_failure_fraction": sum(entry.error is not None for entry in sampled) / len(sampled),
    }
    if rewards:
        passes = [(len(row), sum(reward >= threshold for reward in row)) for row in graded_rows]
        metrics["valid_reward_mean"] = statistics.fmean(rewards)
        metrics["pass_at_1"] = statistics.fmean(pass_at_k(n, c, 1) for n, c in passes)
        metrics["pass_at_k"] = statistics.fmean(pass_at_k(n, c, num_samples) for n, c in passes)
    if greedy_rewards:
        metrics["valid_greedy_reward_mean"] = statistics.fmean(greedy_rewards)
    return metrics


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Chance that at least one of k completions drawn from the sampled ones passed; k is at most their number.

    Source: Chen et al. 2021 (Codex), arXiv:2107.03374 equation 1.
    """
    k = min(k, num_samples)
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def half_width(row_means: list[float]) -> float:
    """Half of the 95 % interval of the mean over rows; 0 for fewer than two."""
    if len(row_means) < 2:
        return 0.0
    return NORMAL_95 * statistics.stdev(row_means) / math.sqrt(len(row_means))
