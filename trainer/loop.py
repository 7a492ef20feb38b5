"""One loop for every algorithm. What differs between PPO and GRPO is `run.estimator`, and whether there are values to learn."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from core.errors import GraderUnavailable, OutOfMemory, PlatformError, TrainerCrashed
from core.run_directory import Control, End, Outcome, step_folder
from graders.build import build_grader
from trainer.batch import Batch, Estimate, Graded
from trainer.collection import Collected, Pending, collection_metrics
from trainer.control import ControlReader, Pulse, StopRequested
from trainer.data import collate
from trainer.doctor import examine
from trainer.metrics import chained_digest, peak_memory_bytes, rollout_metrics
from trainer.session import MakeGrader, Run, Secrets, open_run

log = logging.getLogger("trainer")


def train(run: Run) -> None:
    """Trains from where `run` stands to its last step. Raises: StopRequested between whole steps, GraderUnavailable, Diverged."""
    if run.progress.step == 0 and run.pending is None:
        preflight(run)
    finish_step(run)
    while not run.is_at_end:
        step = run.progress.step + 1
        with run.clock.time("step"):
            pending = run.pending or run.collector.generate(step)
            upcoming = generate_ahead(run, step + 1)
            collected = run.collector.grade(pending)
            batch = replace(collate(collected.graded, run.job.options, run.device), old_logprobs=pending.old_logprobs)
            plan = run.learner.plan(batch, step)
            with run.clock.time("scoring"):
                batch = run.learner.score(batch, plan)
            estimate = run.estimator(batch, run.learner.kl_coefficient)
            with run.clock.time("update"):
                report = run.learner.update(batch, estimate, plan, step)
        record_step(run, step, collected, batch, estimate, report | {"weight_lag": float(pending.weight_lag)})
        run.pending = upcoming
        finish_step(run)


def preflight(run: Run) -> None:
    """Checks what training rests on before anything is trained. Raises: PreflightFailed."""
    found = run.preflight()
    if found.warning is not None:
        run.recorder.event(found.warning, "warn", data={"code": "template_does_not_round_trip"})
    run.recorder.event("Preflight passed.", data={"code": "preflight_passed", **found.measured})


def generate_ahead(run: Run, step: int) -> Pending | None:
    """With `max_staleness` 1 the rollouts of the next step, sampled and scored by the weights before this step's update.

    Graders work on them while this step is graded and learned from. The first two steps are sampled by the initial weights.
    """
    if run.job.options.max_staleness == 0 or step > run.schedule.total_steps:
        return None
    pending = run.collector.generate(step)
    with run.clock.time("scoring"):
        ungraded = collate([Graded(rollout, reward=None) for rollout in pending.rollouts], run.job.options, run.device)
        old_logprobs = run.learner.score_old(ungraded, run.learner.plan(ungraded, step))
    return replace(pending, weight_lag=1, old_logprobs=old_logprobs)


def record_step(run: Run, step: int, collected: Collected, batch: Batch, estimate: Estimate, report: dict[str, float]) -> None:
    """Writes the step's metrics and samples; from here on the step is done."""
    seconds = run.clock.take()
    sampled = sum(len(entry.rollout.token_ids) for entry in collected.all)
    values = {
        **rollout_metrics(collected.all),
        **collection_metrics(collected, run.job.options),
        **estimate.statistics,
        **report,
        **seconds,
    }
    values |= {"tokens_per_second": sampled / seconds["seconds_step"], "peak_memory_bytes": peak_memory_bytes(run.device)}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    digest = chained_digest(run.progress.digest, collected.all, batch, report)
    run.recorder.metrics(step, "train", values, digest)
    run.recorder.samples(step, "train", collected.graded, estimate)
    run.recorder.samples(step, "train", collected.replaced)
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
        train, valid = run.progress.train_metrics, run.progress.valid_metrics if is_evaluated else {}
        run.recorder.announce(step, train, valid)
        consult_doctor(run, train, valid)
        run.advance(announced_step=step)
    if is_evaluated:
        end_early_if_due(run)
    run.grading.journal.forget_steps(step)
    with run.clock.time("checkpoint"):
        if run.is_at_end or (schedule.is_checkpoint_due(step) and run.progress.checkpointed_step < step):
            run.save_checkpoint()
            run.advance(checkpointed_step=step)
            log.info("checkpoint of step %d", step)
        if schedule.is_resume_point_due(step) and not run.is_at_end:
            run.save_resume_point()


def consult_doctor(run: Run, train: dict[str, float], valid: dict[str, float]) -> None:
    """A `warn` event for each thing that the metrics of the last step say goes wrong."""
    doctor, findings = examine(run.progress.doctor, run.job.options, run.progress.step, train, valid)
    for finding in findings:
        data = {"code": "run_doctor", "rule": finding.rule, "evidence": finding.evidence, "advice": finding.advice}
        run.recorder.event(finding.message, "warn", data=data)
    run.advance(doctor=doctor)


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


def end_early_if_due(run: Run) -> None:
    """Marks the run as ended where the evaluation reached `target_reward`, or was the last that `patience` waits for."""
    options, progress = run.job.options, run.progress
    reward = progress.valid_metrics.get("valid_reward_mean")
    if reward is None:
        return
    if progress.step == 0:
        run.advance(best_reward=reward)
        return
    is_best = progress.best_reward is None or reward > progress.best_reward
    since_best = 0 if is_best else progress.evaluations_since_best + 1
    run.advance(best_reward=reward if is_best else progress.best_reward, evaluations_since_best=since_best)
    reason = ""
    if options.target_reward is not None and reward >= options.target_reward:
        reason = f"valid_reward_mean {reward:.4g} has reached target_reward {options.target_reward:g}"
    elif options.patience is not None and since_best >= options.patience:
        reason = f"the last {since_best} evaluations brought no valid_reward_mean above {progress.best_reward:.4g} (patience)"
    if reason and progress.step < run.schedule.total_steps:
        run.advance(ended_early=reason)
        run.recorder.event(f"Ended after step {progress.step}: {reason}.", data={"code": "ended_early", "step": progress.step})


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
        run.recorder.event(f"The job pauses until its grader is back. {error.message}", "warn", data={"code": error.code})
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
