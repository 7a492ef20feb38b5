"""Our side of a race: a real run of `trainer.loop.train` in deterministic mode, stopped between its steps."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import Track
from benchmarks.machine_switches import machine_switches
from benchmarks.phases import PhaseClock, peak_bytes, time_backward
from benchmarks.workload import GROUP_SIZE, LEARNING_RATE, LORA_ALPHA, LORA_RANK, NUM_PROMPTS, Workload, prompt_rows, reward
from core.grader_specs import StringCheckGrader
from core.options import Options
from core.presets import resolve_options
from core.run_directory import JOB, MODEL, TRAIN, ModelSource, ResolvedJob, publish_json
from examples.demo.prompts import as_jsonl
from graders.grade import Grade, GradeRequest
from trainer import rollout
from trainer.control import ControlReader, Pulse
from trainer.data import collate
from trainer.loop import train
from trainer.random import Purpose
from trainer.session import Run, open_run

MANY_STEPS = 1_000_000


def run_ours(track: Track, workload: Workload) -> None:
    """Steps until the race is over."""
    with opened(workload) as run:
        clock = _time_phases(run)
        write = run.recorder.metrics

        def metrics(step: int, phase: Any, values: dict[str, float], digest: str = "") -> None:
            write(step, phase, values, digest)
            track.finish_step(_phases(values, clock.take()), sum(workload.lengths), peak_bytes())

        run.recorder.metrics = metrics  # type: ignore[method-assign]
        track.ready(machine_switches())
        train(run)


def save_gradients(track: Track, workload: Workload, folder: Path) -> None:
    """The gradient of one whole step into `folder`; tells the peer what it was of: the rows in the order of prompt, then g."""
    with opened(workload) as run:
        if workload.finetuning == "lora":
            _move_adapter(run)
            run.policy.save(folder / "adapter")
        graded = run.collector.grade(run.collector.generate(1)).graded
        batch = collate(graded, run.job.options, run.device)
        plan = run.learner.plan(batch, 1)
        batch = run.learner.score(batch, plan)
        run.learner.accumulate(batch, run.estimator(batch, 0.0), plan[0])
        parameters = zip(run.policy.trainable_state(), run.policy.policy_parameters(), strict=True)
        torch.save({name.removeprefix("policy."): parameter.grad for name, parameter in parameters}, folder / "ours.pt")
        graded = sorted(graded, key=lambda entry: (entry.rollout.prompt.index, entry.rollout.g))
        facts = {
            "prompts": [entry.rollout.prompt.token_ids for entry in graded],
            "completions": [entry.rollout.token_ids for entry in graded],
            "rewards": [entry.reward for entry in graded],
            "trained_tokens": int(batch.token_counts.sum()),
        }
        track.ready(facts | machine_switches())


def _move_adapter(run: Run) -> None:
    """Away from B = 0, where the gradient of A is 0 whatever is computed."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in run.policy.trainable_state().items():
        if "lora_B" in name:
            tensor.normal_(std=0.01, generator=generator)


@contextmanager
def opened(workload: Workload) -> Iterator[Run]:
    """A run in a folder that lasts as long, with completions of the wanted lengths."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run_directory(folder, workload)
        force_lengths(workload.lengths)
        pulse = Pulse(folder)
        run = open_run(folder, {}, ControlReader(folder, pulse), pulse, lambda *_: _RewardGrader())
        try:
            yield run
        finally:
            run.close()
            pulse.stop()


def make_run_directory(folder: Path, workload: Workload) -> None:
    publish_json(folder / JOB, make_job(workload))
    (folder / TRAIN).write_bytes(as_jsonl(prompt_rows()))
    (folder / MODEL).symlink_to(workload.model.resolve())


def make_job(workload: Workload) -> ResolvedJob:
    """Deterministic, as every job that does not ask otherwise. Its grader is never made."""
    return ResolvedJob(
        job_id="benchmark",
        attempt=1,
        algorithm="grpo",
        options=make_options(workload),
        seed=1,
        grader=StringCheckGrader(type="string_check", input="{{sample.output_text}}", reference="{{item.answer}}", operation="eq"),
        model=ModelSource(name=workload.model.name, digest=""),
        num_threads=workload.num_threads,
    )


def make_options(workload: Workload) -> Options:
    """GRPO as the peer computes it; never evaluates, never saves."""
    intervals = dict.fromkeys(("max_steps", "eval_interval", "checkpoint_interval", "resume_point_interval"), MANY_STEPS)
    return resolve_options(
        "grpo",
        {
            "finetuning": workload.finetuning,
            "precision": "float32" if workload.precision == "float32" else "bf16",
            "batch_size": NUM_PROMPTS,
            "group_size": GROUP_SIZE,
            "max_completion_tokens": max(workload.lengths),
            "learning_rate": LEARNING_RATE,
            "kl_coefficient": 0.0,
            "advantage_scale": "none",
            "mismatch_correction": "none",
            **intervals,
            **({"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA} if workload.finetuning == "lora" else {}),
        },
    )


def force_lengths(lengths: tuple[int, ...]) -> None:
    """From now on in this process: the rows of a training step end at just these lengths, whatever they say. Preflight is left alone.

    The rule of when a row ends is all that is replaced. Cost: two assignments per token and row.
    """

    class ForcedDecoding(rollout._Decoding):
        def __init__(self, engine: Any, tokenizer: Any, sampling: rollout.Sampling, *others: Any) -> None:
            super().__init__(engine, tokenizer, sampling, *others)
            self._by_length = {
                length: replace(sampling, max_completion_tokens=length, end_token_ids=frozenset()) for length in set(lengths)
            }

        def _finish(self, row: Any) -> bool:
            if self._sampling.purpose is not Purpose.ROLLOUT:
                return super()._finish(row)
            whole, self._sampling = self._sampling, self._by_length[lengths[row.place * GROUP_SIZE + row.g]]
            try:
                return super()._finish(row)
            finally:
                self._sampling = whole

    rollout._Decoding = ForcedDecoding  # type: ignore[misc]


class _RewardGrader:
    """Grades in the trainer's own process, as a local grader does."""

    async def grade(self, request: GradeRequest) -> Grade:
        return Grade(reward=reward(request.output_text))

    async def close(self) -> None:
        pass


def _time_phases(run: Run) -> PhaseClock:
    """A clock that has `forward` and `backward` of the update since the update began."""
    clock = PhaseClock()
    update = run.learner.update

    def update_timed(*arguments: Any) -> dict[str, float]:
        clock.take()
        return update(*arguments)

    run.learner.update = update_timed  # type: ignore[method-assign]
    run.policy.score = clock.timed("forward", run.policy.score)  # type: ignore[method-assign]
    time_backward(clock)
    return clock


def _phases(values: dict[str, float], update: dict[str, float]) -> dict[str, float]:
    """From the step's own metrics and the passes of its update. The forward pass for the metric `kl_old` is one of them."""
    return {
        "generation": values["seconds_rollout"],
        "scoring": values["seconds_grading"] + values["seconds_scoring"],
        **update,
        "optimizer": values["seconds_update"] - sum(update.values()),
    }
