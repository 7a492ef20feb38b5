"""Each way in which a grader can misbehave, against a whole run: `make test-graders` prints what the job did about it."""

from pathlib import Path

import pytest

from core.run_directory import End
from tests.graders_behaviour.behaviours import BEHAVIOURS, FIRST, Behaviour
from tests.graders_behaviour.bench import BATCH_SIZE, GROUP_SIZE, STEPS, Result, run
from tests.trainer.runs import read_metrics

COMPLETIONS = STEPS * BATCH_SIZE * GROUP_SIZE


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=str)
def test_grader_that_misbehaves_invents_no_reward_and_costs_no_more_than_it_must(
    behaviour: Behaviour, tmp_path: Path, results: list[Result]
) -> None:
    result = run(behaviour, tmp_path / "run")
    results.append(result)
    assert result.outcome.end is behaviour.end, result.outcome
    assert (result.invented, result.counted_twice) == (0, 0)
    assert result.seconds >= behaviour.min_seconds
    if behaviour.calls is not None:
        assert result.calls.victim_calls == behaviour.calls
    if behaviour.end is End.PAUSED:
        assert result.outcome.pause_reason == "grader_unavailable"
        assert behaviour.error is not None
        assert behaviour.error in (result.outcome.message or "")
        assert all(line["reward"] is None for line in result.journal)
        assert result.samples == []
        return
    is_missing = behaviour.error is not None or behaviour.is_abstained
    assert len(result.samples) == COMPLETIONS
    assert [sample.error for sample in result.samples if sample.reward is None] == [behaviour.error] * is_missing
    if behaviour.to == FIRST:
        assert set(result.calls.calls.values()) == {2}
    metrics = read_metrics(tmp_path / "run")[0].values
    rewards = [sample.reward for sample in result.samples if sample.step == 1 and sample.reward is not None]
    assert metrics["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics.get(f"grader_errors/{behaviour.error}", 0.0) == float(behaviour.error is not None)
