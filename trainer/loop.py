"""One loop for every algorithm. What differs between PPO and GRPO is `run.estimator`, and whether there are values to learn."""

import logging
import math
from pathlib import Path

import torch

from core.errors import GraderUnavailable, OutOfMemory, PlatformError, TrainerCrashed
from core.run_directory import Control, End, Outcome, step_folder
from graders.build import build_grader
from trainer.batch import Batch, Estimate, Graded
from trainer.control import ControlReader, Pulse, StopRequested
from trainer.data import collate
from trainer.metrics import chained_digest, peak_memory_bytes, rollout_metrics
from trainer.random import Purpose
from trainer.session import MakeGrader, Run, Secrets, open_run

log = logging.getLogger("trainer")


def train(run: Run) -> None:
    """Trains from where `run` stands to its last step. Raises: StopRequested between whole steps, GraderUnavailable, Diverged."""
    options = run.job.options
    assert options.group_size is not None
    finish_step(run)
    for step in range(run.progress.step + 1, run.schedule.total_steps + 1):
        with run.clock.time("step"):
            prompts = [run.prompts[row] for row in run.order.rows(step)]
            with run.grading.open("rollout", step) as verdicts:
                with run.clock.time("rollout"):
                    sampling = run.sampling(Purpose.ROLLOUT, step)
                    rollouts = run.engine.generate(prompts, options.group_size, sampling, on_finished=verdicts.add, check=run.control.check)
                with run.clock.time("grading"):
                    graded = verdicts.collect(rollouts, run.control.check_waiting)
            batch = collate(graded, mask_truncated=options.mask_truncated, device=run.device)
            plan = run.learner.plan(batch, step)
            with run.clock.time("scoring"):
                batch = run.learner.score(batch, plan)
            estimate = run.estimator(batch)
            with run.clock.time("update"):
                report = run.learner.update(batch, estimate, plan, step)
        record_step(run, step, graded, batch, estimate, report)
        finish_step(run)


def record_step(run: Run, step: int, graded: list[Graded], batch: Batch, estimate: Estimate, report: dict[str, float]) -> None:
    """Writes the step's metrics and samples; from here on the step is done."""
    seconds = run.clock.take()
    sampled = sum(len(entry.rollout.token_ids) for entry in graded)
    values = {**rollout_metrics(graded), **estimate.statistics, **report, **seconds}
    values |= {"tokens_per_second": sampled / seconds["seconds_step"], "peak_memory_bytes": peak_memory_bytes(run.device)}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    digest = chained_digest(run.progress.digest, graded, batch, report)
    run.recorder.metrics(step, "train", values, digest)
    run.recorder.samples(step, "train", graded, estimate)
    trained_tokens = run.progress.trained_tokens + int(batch.token_counts.sum())
    run.advance(step=step, digest=digest, trained_tokens=trained_tokens, train_metrics=values)
    log.info(
        "step %d/%d reward %.3f in %.1f s", step, run.schedule.total_steps, values.get("reward_mean", math.nan), seconds["seconds_step"]
    )


def finish_step(run: Run) -> None:
    """What is due once a step is done (or before the first): evaluation, event, checkpoint, resume point. Can be repeated after a stop."""
    step, schedule = run.progress.step, run.schedule
    is_evaluated = evaluate_if_due(run)
    if is_evaluated or run.progress.announced_step < step:
        run.recorder.announce(step, run.progress.train_metrics, run.progress.valid_metrics if is_evaluated else {})
        run.advance(announced_step=step)
    run.grading.journal.forget_steps(step)
    with run.clock.time("checkpoint"):
        is_last = step == schedule.total_steps
        if schedule.is_checkpoint_due(step) and (is_last or run.progress.checkpointed_step < step):
            run.save_checkpoint()
            run.advance(checkpointed_step=step)
            log.info("checkpoint of step %d", step)
        if schedule.is_resume_point_due(step):
            run.save_resume_point()


def evaluate_if_due(run: Run) -> bool:
    """Whether the current weights were evaluated now."""
    step = run.progress.step
    if run.evaluator is None or not run.schedule.is_evaluation_due(step) or run.progress.evaluated_step == step:
        return False
    with run.clock.time("evaluation"):
        evaluation = run.evaluator.evaluate(step, run.control.check, run.control.check_waiting)
    run.recorder.metrics(step, "valid", evaluation.metrics)
    run.recorder.samples(step, "valid", evaluation.graded)
    run.advance(evaluated_step=step, valid_metrics=evaluation.metrics)
    return True


def run_job(directory: Path, secrets: Secrets, control: ControlReader, pulse: Pulse, make_grader: MakeGrader = build_grader) -> Outcome:
    """Trains what `directory` describes and says how that ended. Never raises for what a job, a grader or a machine can cause."""
    run: Run | None = None
    try:
        run = open_run(directory, secrets, control, pulse, make_grader)
        return _train_to_end(run)
    except Exception as error:
        log.exception("the run failed")
        return _outcome(run, End.FAILED, error=_typed(error))
    finally:
        if run is not None:
            run.close()


def _train_to_end(run: Run) -> Outcome:
    try:
        train(run)
    except StopRequested as stop:
        return _stop(run, stop.control)
    except GraderUnavailable as error:
        log.warning("paused: %s", error.message)
        run.save_resume_point()
        run.recorder.event(error.message, "warn", data={"code": error.code})
        return _outcome(run, End.PAUSED, pause_reason=error.code, error=error)
    return _outcome(run, End.SUCCEEDED, final_checkpoint=step_folder(run.progress.step))


def _stop(run: Run, control: Control) -> Outcome:
    """Saves what the worker asked for. The weights are those of the last whole step."""
    log.info("asked to %s after step %d", control, run.progress.step)
    if control is Control.CANCEL:
        return _outcome(run, End.CANCELLED)
    run.save_resume_point()
    if control is Control.PAUSE and run.progress.step > 0:
        run.save_checkpoint()
    return _outcome(run, End.PAUSED)


def _typed(error: Exception) -> PlatformError:
    """`error` with the code that the job will carry."""
    if isinstance(error, PlatformError):
        return error
    text = f"{type(error).__name__}: {error}"
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
    return OutOfMemory(f"The trainer ran out of memory: {text}") if is_memory else TrainerCrashed(f"The trainer crashed: {text}")


def _outcome(
    run: Run | None,
    end: End,
    *,
    final_checkpoint: str | None = None,
    pause_reason: str | None = None,
    error: PlatformError | None = None,
) -> Outcome:
    return Outcome(
        end=end,
        step=run.progress.step if run else 0,
        trained_tokens=run.progress.trained_tokens if run else 0,
        final_checkpoint=final_checkpoint,
        pause_reason=pause_reason,
        code=error.code if error else None,
        message=error.message if error else None,
        param=error.param if error else None,
        retryable=error.retryable if error else False,
    )
