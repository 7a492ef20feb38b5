import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import PlatformError
from core.run_directory import CHECKPOINTS, EVENTS, JOB, RESUME_POINTS, Control, End, ModelSource, ResolvedJob, published, write_control
from graders.grade import Grade, GradeRequest
from tests.tiny import build_tiny_model
from tests.trainer.runs import (
    FunctionGrader,
    letter_fraction,
    letter_rows,
    make_run_directory,
    read_metrics,
    read_samples,
    train_here,
    write_rows,
)
from tests.trainer.test_families import save_model
from trainer.control import ControlReader, Pulse
from trainer.update import Learner


def read_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


def steps_of(folder: Path, kind: str) -> list[str]:
    return [path.name for path in published(folder, kind)]


def test_a_run_leaves_metrics_events_samples_checkpoints_and_says_how_it_ended(tmp_path: Path) -> None:
    folder = make_run_directory(
        tmp_path / "run", max_steps=4, checkpoint_interval=2, resume_point_interval=3, valid_rows=2, eval_interval=2
    )
    outcome = train_here(folder)
    assert (outcome.end, outcome.step, outcome.final_checkpoint) == (End.SUCCEEDED, 4, "step_000004")
    assert outcome.trained_tokens == sum(sample.num_tokens for sample in read_samples(folder))
    assert steps_of(folder, CHECKPOINTS) == ["step_000002", "step_000004"]
    assert steps_of(folder, RESUME_POINTS) == ["step_000003"]
    messages = [event["message"] for event in read_events(folder) if event["type"] == "metrics"]
    assert [message.split(" ,")[0] for message in messages] == ["Step 0/4", "Step 1/4", "Step 2/4", "Step 3/4", "Step 4/4"]
    assert "train mean reward=" in messages[2]
    assert "full validation mean reward=" in messages[2]
    assert "validation" not in messages[1]


DOCUMENTED = {
    "reward_mean",
    "reward_std",
    "reward_min",
    "reward_max",
    "completion_tokens_mean",
    "completion_tokens_max",
    "truncated_fraction",
    "zero_variance_group_fraction",
    "underfilled_group_fraction",
    "grader_failure_fraction",
    "loss",
    "policy_loss",
    "value_loss",
    "kl_reference",
    "kl_old",
    "sampler_mismatch_kl",
    "weight_lag",
    "clip_fraction",
    "ratio_max",
    "entropy",
    "grad_norm",
    "value_grad_norm",
    "explained_variance",
    "learning_rate",
    "kl_coefficient",
    "seconds_rollout",
    "seconds_grading",
    "seconds_scoring",
    "seconds_update",
    "seconds_checkpoint",
    "tokens_per_second",
    "peak_memory_bytes",
}


def test_every_step_reports_every_documented_metric(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", algorithm="ppo", max_steps=2, kl_coefficient=0.1, group_size=2)
    train_here(folder)
    for line in read_metrics(folder):
        assert line.values.keys() >= DOCUMENTED
    data = [event["data"] for event in read_events(folder) if event["type"] == "metrics"]
    assert [entry["train_mean_reward"] for entry in data] == [line.values["reward_mean"] for line in read_metrics(folder)]
    assert all(entry["train_reward_mean"] == entry["train_mean_reward"] == entry["scores"]["train_reward_mean"] for entry in data)


def test_each_steps_digest_depends_on_all_before_it(tmp_path: Path) -> None:
    curves = []
    for name, flip in (("a", False), ("b", True)):
        folder = make_run_directory(tmp_path / name, max_steps=3, learning_rate=1e-12)

        def grade(request: GradeRequest, flip: bool = flip) -> float:
            return 1.0 if flip and request.metadata["step"] == 2 else letter_fraction(request)

        train_here(folder, FunctionGrader(grade))
        curves.append([line.digest for line in read_metrics(folder)])
    assert curves[0][0] == curves[1][0]
    assert curves[0][1] != curves[1][1]
    assert curves[0][2] != curves[1][2]


def test_samples_show_the_reward_and_the_advantage_it_led_to(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=1, advantage_scale="none")
    train_here(folder)
    samples = read_samples(folder)
    assert len(samples) == 32
    for index in {sample.prompt_index for sample in samples}:
        group = [sample for sample in samples if sample.prompt_index == index]
        mean = sum(sample.reward or 0.0 for sample in group) / len(group)
        assert [sample.advantage for sample in group] == pytest.approx([(sample.reward or 0.0) - mean for sample in group], abs=1e-6)
        assert [sample.reward for sample in group] == [sample.completion.count("abcdefgh"[index % 8]) / 8 for sample in group]


def test_a_failed_grade_is_shown_as_missing_and_never_as_0(tmp_path: Path) -> None:
    def grade(request: GradeRequest) -> Grade:
        is_lost = request.output_text and request.output_text[0] < "c"
        return Grade(reward=None, error="grader_timeout") if is_lost else Grade(reward=1.0 + len(request.output_text))

    folder = make_run_directory(tmp_path / "run", max_steps=1, max_grader_failure_fraction=1.0)
    assert train_here(folder, FunctionGrader(grade)).end is End.SUCCEEDED
    samples = read_samples(folder)
    failed = [sample for sample in samples if sample.error]
    assert failed
    assert all(sample.reward is None and sample.advantage is None for sample in failed)
    values = read_metrics(folder)[0].values
    assert values["grader_failure_fraction"] == len(failed) / 32
    assert values["reward_min"] >= 1.0


def test_a_grader_that_is_away_pauses_the_run_with_its_resume_point(tmp_path: Path) -> None:
    def grade(request: GradeRequest) -> Grade | float:
        return Grade(reward=None, error="grader_connection_error", error_message="refused") if request.metadata["step"] == 2 else 0.5

    folder = make_run_directory(tmp_path / "run", max_steps=3)
    outcome = train_here(folder, FunctionGrader(grade))
    assert (outcome.end, outcome.step, outcome.pause_reason) == (End.PAUSED, 1, "grader_unavailable")
    assert steps_of(folder, RESUME_POINTS) == ["step_000001"]
    assert [line.step for line in read_metrics(folder)] == [1]
    assert read_events(folder)[-1]["level"] == "warn"
    assert train_here(folder).step == 3


@pytest.mark.parametrize(
    ("control", "end", "resume_points", "checkpoints"),
    [
        (Control.PAUSE, End.PAUSED, ["step_000001"], ["step_000001"]),
        (Control.DRAIN, End.PAUSED, ["step_000001"], []),
        (Control.CANCEL, End.CANCELLED, [], []),
    ],
)
def test_control_stops_in_the_middle_of_a_step_with_what_it_asks_for(
    tmp_path: Path, control: Control, end: End, resume_points: list[str], checkpoints: list[str]
) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=5, checkpoint_interval=5)

    def grade(request: GradeRequest) -> float:
        if request.metadata["step"] == 2:
            write_control(folder, control)
        return letter_fraction(request)

    outcome = train_here(folder, FunctionGrader(grade))
    assert (outcome.end, outcome.step, outcome.pause_reason, outcome.code) == (end, 1, None, None)
    assert steps_of(folder, RESUME_POINTS) == resume_points
    assert steps_of(folder, CHECKPOINTS) == checkpoints


def test_sigterm_drains_but_the_control_file_knows_better(tmp_path: Path) -> None:
    for name, control, end in (("a", None, End.PAUSED), ("b", Control.CANCEL, End.CANCELLED)):
        folder = make_run_directory(tmp_path / name, max_steps=3)
        pulse = Pulse(folder)
        reader = ControlReader(folder, pulse)
        reader.terminate()
        if control is not None:
            write_control(folder, control)
        assert train_here(folder, control=reader).end is end
        pulse.stop()


def test_a_stop_during_an_evaluation_repeats_only_the_evaluation(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=3, valid_rows=2, eval_interval=2)

    def grade(request: GradeRequest) -> float:
        if request.metadata["step"] == 2 and len(read_metrics(folder)) == 2:
            write_control(folder, Control.DRAIN)
        return letter_fraction(request)

    assert train_here(folder, FunctionGrader(grade)).step == 2
    assert [line.step for line in read_metrics(folder, "valid")] == [0]
    (folder / "control").unlink()
    assert train_here(folder).end is End.SUCCEEDED
    assert [line.step for line in read_metrics(folder, "valid")] == [0, 2, 3]
    assert [line.step for line in read_metrics(folder)] == [1, 2, 3]


def failing_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def update(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Learner, "update", update)


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (MemoryError(), "out_of_memory", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out_of_memory", False),
        (RuntimeError("shape mismatch"), "trainer_crashed", True),
        (PlatformError("x", code="diverged"), "diverged", False),
    ],
)
def test_a_failure_ends_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, retryable: bool
) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=2)
    failing_with(monkeypatch, error)
    outcome = train_here(folder)
    assert (outcome.end, outcome.code, outcome.retryable, outcome.step) == (End.FAILED, code, retryable, 0)
    assert steps_of(folder, CHECKPOINTS) == []


def test_a_learning_rate_that_ruins_the_weights_ends_as_diverged(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=30, learning_rate=1e30)
    outcome = train_here(folder, FunctionGrader(lambda request: float(len(set(request.output_text)))))
    assert (outcome.end, outcome.code) == (End.FAILED, "diverged")


def test_a_prompt_that_is_too_long_is_refused_before_the_first_step_with_its_line(tmp_path: Path) -> None:
    rows = [*letter_rows(3), {"messages": [{"role": "user", "content": "a" * 600}], "letter": "a"}]
    folder = make_run_directory(tmp_path / "run", train_rows=rows)
    grader = FunctionGrader(letter_fraction)
    outcome = train_here(folder, grader)
    assert (outcome.end, outcome.code, outcome.param, outcome.retryable) == (End.FAILED, "prompt_too_long", "training_file", False)
    assert "Line 4" in (outcome.message or "")
    assert grader.requests == []
    write_rows(folder / "train.jsonl", letter_rows(3))
    write_rows(folder / "valid.jsonl", rows)
    assert train_here(folder).param == "validation_file"


def test_weights_that_changed_since_the_job_was_made_are_refused(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=1)
    job = ResolvedJob.model_validate_json((folder / JOB).read_text())
    pinned = job.model_copy(update={"model": ModelSource(name="tiny", digest="0" * 64)})
    (folder / JOB).write_text(pinned.model_dump_json())
    assert train_here(folder).code == "model_changed"


@pytest.mark.parametrize("missing", [JOB, "train.jsonl", "model/model.safetensors"])
def test_a_directory_that_is_not_whole_fails_with_a_code_and_no_traceback_as_message(tmp_path: Path, missing: str) -> None:
    folder = make_run_directory(tmp_path / "run")
    (folder / missing).unlink()
    outcome = train_here(folder)
    assert outcome.end is End.FAILED
    assert outcome.code == "training_error"


def test_more_prompts_per_step_than_rows_takes_each_row_once_and_says_so(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", rows=3, batch_size=8, max_steps=1)
    assert train_here(folder).end is End.SUCCEEDED
    assert sorted({sample.prompt_index for sample in read_samples(folder)}) == [0, 1, 2]
    assert [event["data"]["code"] for event in read_events(folder) if event["level"] == "warn"] == ["batch_size_reduced"]


def test_a_family_that_is_decoded_by_the_library_trains_and_says_so_once(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=2, eval_interval=1, valid_rows=2)
    save_model("mixtral", folder / "model")
    assert train_here(folder).end is End.SUCCEEDED
    said = [event for event in read_events(folder) if event["data"].get("code") == "generic_rollout_engine"]
    assert [(event["level"], event["data"]["model_class"]) for event in said] == [("warn", "MixtralForCausalLM")]


def test_no_other_generator_of_random_numbers_is_used(tmp_path: Path) -> None:
    first = make_run_directory(tmp_path / "a", algorithm="ppo", max_steps=2, finetuning="lora", lora_rank=2)
    second = make_run_directory(tmp_path / "b", algorithm="ppo", max_steps=2, finetuning="lora", lora_rank=2)
    torch.manual_seed(1)
    train_here(first)
    torch.manual_seed(999)
    train_here(second)
    assert [line.digest for line in read_metrics(first)] == [line.digest for line in read_metrics(second)]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    folders = [make_run_directory(tmp_path / str(seed), seed=seed, max_steps=1) for seed in (1, 2)]
    for folder in folders:
        build_tiny_model(folder / "model", seed=0)
        train_here(folder)
    assert read_metrics(folders[0])[0].digest != read_metrics(folders[1])[0].digest


def test_the_beat_goes_on_while_nothing_else_does(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path)
    first = (tmp_path / "beat").stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / "beat").stat().st_mtime_ns == first and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "beat").stat().st_mtime_ns > first
    pulse.stop()
