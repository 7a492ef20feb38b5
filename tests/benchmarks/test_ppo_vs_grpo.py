"""The parts of the comparison that need no training: what is compared, how it is graded, how the table comes out of the runs."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison_table import Column, Learned, Timed, make_table, models_held, read_learned, read_timed
from benchmarks.ppo_vs_grpo import CONFIGURATIONS, LAST_INTEGER, TIME, Configuration, plan
from benchmarks.trainer_runs import RunFailed, ensure_run, has_succeeded, read_metrics
from core.options import Options
from core.run_directory import (
    CHECKPOINTS,
    JOB,
    METRICS,
    MODEL,
    OUTCOME,
    SAMPLES,
    End,
    LineWriter,
    MetricsLine,
    Outcome,
    ResolvedJob,
    publish_json,
)
from examples.demo import settings
from examples.endpoint_grader import MODES
from graders.grade import GradeRequest
from graders.python_sandbox import PythonGrader
from tests.trainer.runs import letter_rows, make_run_directory
from trainer.config import load_job

GRPO, PPO, PPO_SINGLE = CONFIGURATIONS


def differing(first: Configuration, second: Configuration) -> set[str]:
    one, other = first.options(40).model_dump(), second.options(40).model_dump()
    return {name for name in one if one[name] != other[name]}


def test_grpo_and_ppo_differ_in_the_estimator_and_its_value_model_alone() -> None:
    assert differing(GRPO, PPO) == {"advantage_estimator", "value_model", "value_learning_rate"}


def test_single_completions_are_as_many_as_grouped_ones() -> None:
    assert differing(PPO, PPO_SINGLE) == {"batch_size", "group_size"}
    grouped, single = PPO.options(40), PPO_SINGLE.options(40)
    assert grouped.group_size is not None
    assert (single.batch_size, single.group_size) == (grouped.batch_size * grouped.group_size, 1)


def test_each_round_begins_with_another_configuration_and_has_all_of_them() -> None:
    tasks = plan(TIME, steps=6, repeats=4, num_threads=2)
    rounds = [[task.configuration for task in tasks if task.seed == seed] for seed in (1, 2, 3, 4)]
    assert all(sorted(members, key=CONFIGURATIONS.index) == list(CONFIGURATIONS) for members in rounds)
    assert [members[0] for members in rounds] == [*CONFIGURATIONS, CONFIGURATIONS[0]]
    assert len({task.folder(Path()) for task in tasks}) == len(tasks)


@pytest.mark.parametrize(
    "text", ["76", "It is 76.", "47 + 29 = 76", "76 = 47 + 29", "-76", "x76y", "7 6", "", "seventy-six", "76\n", "76.0"]
)
def test_the_grader_agrees_with_the_one_of_the_demo(text: str) -> None:
    async def grade() -> float | None:
        grader = PythonGrader(LAST_INTEGER)
        try:
            return (await grader.grade(GradeRequest(item={"answer": "76"}, output_text=text))).reward
        finally:
            await grader.close()

    assert asyncio.run(grade()) == float(MODES["last_integer"](text, "76"))


def test_models_held_are_those_with_weights_of_their_own() -> None:
    assert models_held(GRPO.options(40)) == ["policy", "reference"]
    assert models_held(PPO.options(40)) == ["policy", "reference", "value"]
    assert models_held(Options(finetuning="full", kl_coefficient=0.0, value_model="shared_backbone")) == ["policy"]


def step(seconds: float, peak: float) -> dict[str, float]:
    phases = {"seconds_rollout": 0.2 * seconds, "seconds_scoring": 0.1 * seconds, "seconds_update": 0.7 * seconds}
    return {"seconds_step": seconds, **phases, "peak_memory_bytes": peak}


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_table_says_what_the_runs_measured_with_ratios_to_the_first_column() -> None:
    grpo = Column(
        "GRPO",
        GRPO.options(40),
        [Learned({0: 0.0, 1: 0.0}, {0: 0.5, 1: 1.0}), Learned({0: 0.0, 1: 0.5}, {0: 0.5, 1: 0.5})],
        [Timed([step(3.0, 2e9), step(9.0, 4e9)]), Timed([step(4.0, 3e9)])],
    )
    ppo = Column("PPO", PPO.options(40), [Learned({0: 0.0, 1: 0.0}, {0: 0.25, 1: 0.5})], [Timed([step(6.0, 7e9)])])
    found = cells(make_table([grpo, ppo]))
    assert found["prompts x completions per step"] == ["8 x 4", "8 x 4"]
    assert found["models held"] == ["2 (policy, reference)", "3 (policy, reference, value)"]
    assert found["held-out reward before"] == ["0.125 (0.000, 0.250)", "0.000 (0.000)"]
    assert found["held-out reward after 40 steps"] == ["0.625 (0.750, 0.500)", "0.375 (0.375)"]
    # Over questions: +0.5 and +0.5 without spread; 0.25 - 0.5 and 0.5 - 0.75 likewise.
    assert found["rise, 95 % interval"][0] == "+0.500 (+0.500 to +0.500)"
    assert found["after, against GRPO, 95 % interval"] == ["-", "-0.250 (-0.250 to -0.250)"]
    assert found["seconds per step"] == ["4.00 s", "6.00 s (1.50 x)"]
    assert found["of which rollout, scoring, update"] == ["0.80 + 0.40 + 2.80", "1.20 + 0.60 + 4.20"]
    assert found["peak memory"] == ["3.50 GB", "7.00 GB (2.00 x)"]


def test_what_was_not_run_yet_is_left_open() -> None:
    found = cells(make_table([Column("GRPO", GRPO.options(40), [], []), Column("PPO", PPO.options(40), [], [Timed([step(6.0, 7e9)])])]))
    assert found["held-out reward before"] == found["rise, 95 % interval"] == found["seconds per step"] == ["-", "-"]


def test_rewards_are_read_from_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / SAMPLES)
    lines = [("train", 1, 0.25), ("valid", 0, 0.0), ("valid", 20, 0.5), ("valid", 40, 1.0)]
    for phase, number, reward in lines:
        for index in (0, 1):
            writer.write_many([{"phase": phase, "step": number, "prompt_index": index, "reward": reward}] * settings.EVAL_SAMPLES)
    writer.close()
    assert read_learned(tmp_path, GRPO.options(40)) == Learned({0: 0.0, 1: 0.0}, {0: 1.0, 1: 1.0})


def test_steps_in_which_memory_is_taken_are_not_timed(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / METRICS)
    writer.write_many([MetricsLine(step=number, phase="train", values=step(10.0 - number, number * 1e9)) for number in (1, 2, 3, 4)])
    writer.close()
    timed = read_timed(tmp_path)
    assert [values["seconds_step"] for values in timed.steps] == [7.0, 6.0]
    assert timed.peak_memory_bytes == 4e9


def test_only_the_finished_run_of_the_same_job_is_kept(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=2)
    job = load_job(folder)
    assert not has_succeeded(tmp_path / "nowhere", job)
    assert not has_succeeded(folder, job)
    publish_json(folder / OUTCOME, Outcome(end=End.FAILED, step=1))
    assert not has_succeeded(folder, job)
    publish_json(folder / OUTCOME, Outcome(end=End.SUCCEEDED, step=2))
    assert has_succeeded(folder, job)
    assert not has_succeeded(folder, job.model_copy(update={"job_id": "benchmark-of-another-commit"}))
    (folder / JOB).write_text(json.dumps({**job.model_dump(mode="json"), "an_option_of_another_version": 1}))
    assert not has_succeeded(folder, job)


def test_a_line_that_the_trainer_is_still_writing_is_not_read(tmp_path: Path) -> None:
    line = MetricsLine(step=1, phase="train", values={"reward_mean": 0.5}).model_dump_json()
    (tmp_path / METRICS).write_text(f"{line}\n{line[:20]}")
    assert len(read_metrics(tmp_path, "train")) == 1


def make_job(folder: Path, **options: Any) -> tuple[ResolvedJob, Path]:
    """A job for the tiny model, and the model's folder."""
    directory = make_run_directory(folder, max_steps=2, eval_interval=2, checkpoint_interval=2, **options)
    return load_job(directory), directory / MODEL


def test_a_run_is_made_once_and_again_only_for_another_job(tmp_path: Path) -> None:
    """Spawns the trainer: that the real program runs in such a directory is what is tested."""
    job, model = make_job(tmp_path / "job")
    folder, rows = tmp_path / "run", letter_rows(8)
    ensure_run(folder, job, model, rows, rows)
    assert [line.step for line in read_metrics(folder, "train")] == [1, 2]
    assert [line.step for line in read_metrics(folder, "valid")] == [0, 2]
    assert not (folder / CHECKPOINTS).exists()
    written = (folder / METRICS).stat().st_mtime_ns
    ensure_run(folder, job, model, rows, rows)
    assert (folder / METRICS).stat().st_mtime_ns == written
    with pytest.raises(RunFailed, match="messages"):
        ensure_run(folder, job.model_copy(update={"seed": 2}), model, [{"letter": "a"}], [])
