import json
import random

import pytest

from trainer.checkpoints import Progress
from trainer.doctor import DoctorState
from trainer.history import EVALUATIONS, FIRST_STEPS, REMEMBERED, WINDOW, History

STEPS = 3 * WINDOW


def grown(steps: int, **metrics: float) -> History:
    history = History()
    for step in range(1, steps + 1):
        history = history.after(step, {name: value * step for name, value in metrics.items()}, {})
    return history


def test_means_are_over_the_newest_window_the_one_before_and_the_first_steps() -> None:
    history = grown(STEPS, entropy=1.0)
    assert history.mean("entropy") == pytest.approx(sum(range(STEPS - WINDOW + 1, STEPS + 1)) / WINDOW)
    assert history.mean_before("entropy") == pytest.approx(history.mean("entropy") - WINDOW)
    assert history.median("entropy") == pytest.approx((history.mean("entropy") + history.mean_before("entropy")) / 2)
    assert history.first_mean("entropy") == pytest.approx((FIRST_STEPS + 1) / 2)
    assert history.least("entropy") == STEPS - WINDOW + 1
    assert history.window_steps() == {"first_step": STEPS - WINDOW + 1, "last_step": STEPS}


def test_too_few_steps_or_a_step_without_the_metric_is_less_than_nothing_and_more_than_nothing_at_once() -> None:
    short = grown(WINDOW - 1, entropy=1.0)
    holed = grown(STEPS, entropy=1.0).after(STEPS + 1, {"reward_mean": 1.0}, {})
    for history in (History(), short, holed):
        for value in (history.mean("entropy"), history.median("entropy"), history.least("entropy")):
            assert not value <= 1e9
            assert not value >= -1e9
    assert not History().first_mean("entropy") <= 1e9


def test_an_evaluation_is_remembered_with_the_training_reward_that_led_to_it() -> None:
    valid = {"valid_reward_mean": 0.5, "valid_reward_half_width": 0.1, "pass_at_1": 0.4}
    history = grown(STEPS, reward_mean=1.0, reward_std=2.0).after(STEPS, {}, valid)
    (evaluation,) = history.evaluations
    assert evaluation.step == STEPS
    mean = history.mean("reward_mean")
    assert evaluation.values == {"valid_reward_mean": 0.5, "valid_reward_half_width": 0.1, "reward_mean": mean, "reward_std": 2 * mean}
    assert History().after(0, {}, valid).evaluations == ()
    assert history.after(STEPS + 1, {}, {"valid_reward_half_width": 0.0}).evaluations == (evaluation,)


def test_it_is_bounded_and_comes_back_from_a_manifest_bit_for_bit() -> None:
    numbers = random.Random(0)
    history = History()
    for step in range(1, 10 * WINDOW):
        train = {name: numbers.gauss(0, 1) * 10 ** numbers.uniform(-9, 9) for name in (*REMEMBERED, "loss", "seconds_step")}
        history = history.after(step, train, {"valid_reward_mean": numbers.random(), "valid_reward_half_width": numbers.random()})
    assert (len(history.first), len(history.recent), len(history.evaluations)) == (FIRST_STEPS, 2 * WINDOW, EVALUATIONS)
    assert all(set(seen.values) == set(REMEMBERED) for seen in history.recent)
    progress = Progress(step=7, doctor=DoctorState(history=history))
    assert Progress.model_validate(json.loads(progress.model_dump_json())) == progress
