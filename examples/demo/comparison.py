"""Before against after on the held-out rows, paired by row."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from examples.demo.programs import DemoFailed

Sample = dict[str, Any]
Z_95 = 1.959964


@dataclass(frozen=True)
class Comparison:
    before: float
    after: float
    lower: float
    upper: float
    """The 95 % interval of the mean difference over rows."""
    num_rows: int

    @property
    def rise(self) -> float:
        return self.after - self.before


def row_rewards(samples: Iterable[Sample], eval_samples: int) -> dict[int, float]:
    """Prompt index -> mean reward of its completions. Raises: DemoFailed when a row lacks a graded completion."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample["reward"] is None:
            raise DemoFailed(f"held-out row {sample['prompt_index']} has a completion without a grade: {sample.get('error')}")
        rewards[sample["prompt_index"]].append(float(sample["reward"]))
    short = [index for index, found in rewards.items() if len(found) != eval_samples]
    if short or not rewards:
        raise DemoFailed(f"held-out rows without {eval_samples} graded completions: {short or 'all'}")
    return {index: statistics.fmean(found) for index, found in rewards.items()}


def compare(before: dict[int, float], after: dict[int, float]) -> Comparison:
    """Normal interval over the rows' differences. Raises: DemoFailed when the rows differ."""
    if before.keys() != after.keys() or len(before) < 2:
        raise DemoFailed(f"the evaluations cover different rows: {len(before)} before, {len(after)} after")
    differences = [after[index] - before[index] for index in sorted(before)]
    mean = statistics.fmean(differences)
    half = Z_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return Comparison(
        before=statistics.fmean(before.values()),
        after=statistics.fmean(after.values()),
        lower=mean - half,
        upper=mean + half,
        num_rows=len(differences),
    )
