"""How an attempt ended, and its last words in the database: the model, the error, the release of the lease, in one transaction."""

import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.errors import OutOfMemory, PlatformError, TrainerCrashed
from core.lifecycle import PauseReason, Status
from core.redaction import Redactor
from core.run_directory import CHECKPOINTS, LOG, End, Outcome, published, read_manifest, read_outcome
from database.checkpoints import final_model
from database.guards import guard
from database.leases import release
from database.models import Checkpoint, Job
from database.progress import add_event
from worker.context import Holding

LOG_END_BYTES = 16_384
LOG_END_CHARACTERS = 4000
_MEMORY = re.compile(r"OutOfMemoryError|out of memory|MemoryError|[Cc]an(?:no|')t allocate memory|std::bad_alloc")


@dataclass(frozen=True)
class Conclusion:
    """What `write_conclusion` writes. Neither status nor error: back to the queue, without a fault."""

    reason: str
    status: Status | None = None
    error: PlatformError | None = None
    log_end: str = ""
    """Clean of secrets; shown when the job has an error."""

    from_step: int = 0
    to_step: int | None = None
    trained_tokens: int | None = None
    final_step: int | None = None
    """Of the published checkpoint that becomes the fine-tuned model."""

    pause_reason: str | None = None


def judge(holding: Holding, exit_code: int | None, was_killed: bool, num_oom_kills: int, redactor: Redactor, from_step: int) -> Conclusion:
    """What the trainer's end means. `num_oom_kills`: of this machine's kernel while the trainer ran."""
    log_end = redactor.clean(_log_end(holding.directory))
    outcome = read_outcome(holding.directory)
    if outcome is not None and holding.error is None:
        return _judge_outcome(holding, outcome, log_end, redactor, from_step)
    if holding.error is not None:
        return Conclusion(holding.error.code, error=holding.error, log_end=log_end, from_step=from_step)
    if holding.wanted != Status.RUNNING or (was_killed and holding.worker.drain.is_set()):
        return Conclusion(wind_down_reason(holding), from_step=from_step)
    error = crash(exit_code, log_end, num_oom_kills)
    return Conclusion(error.code, error=error, log_end=log_end, from_step=from_step)


def crash(exit_code: int | None, log_end: str, num_oom_kills: int) -> PlatformError:
    """The error of a trainer that ended without an outcome and without being told to."""
    how = f"by {signal.Signals(-exit_code).name}" if exit_code is not None and exit_code < 0 else f"with code {exit_code}"
    if (exit_code == -signal.SIGKILL and num_oom_kills > 0) or _MEMORY.search(log_end):
        return OutOfMemory(f"The trainer ran out of memory and ended {how}. Lower microbatch_tokens, group_size or max_completion_tokens.")
    lines = log_end.strip().splitlines()
    return TrainerCrashed(f"The trainer ended {how}." + (f" Its last line: {lines[-1][:500]}" if lines else ""))


def wind_down_reason(holding: Holding) -> str:
    return {Status.CANCELLED: "cancelled", Status.PAUSED: "paused"}.get(holding.wanted, "drain")


def _judge_outcome(holding: Holding, outcome: Outcome, log_end: str, redactor: Redactor, from_step: int) -> Conclusion:
    plain = Conclusion(wind_down_reason(holding), from_step=from_step, to_step=outcome.step, trained_tokens=outcome.trained_tokens)
    match outcome.end:
        case End.SUCCEEDED if (final_step := _final_step(holding.directory, outcome)) is not None:
            return replace(plain, reason="succeeded", status=Status.SUCCEEDED, final_step=final_step)
        case End.SUCCEEDED:
            error: PlatformError = TrainerCrashed("The trainer says that it succeeded, but left no model.", retryable=False)
            return replace(plain, reason=error.code, error=error, log_end=log_end)
        case End.FAILED:
            message = redactor.clean(outcome.message or "The training failed.")
            error = PlatformError(message, code=outcome.code or "training_error", param=outcome.param, retryable=outcome.retryable)
            return replace(plain, reason=error.code, error=error, log_end=log_end)
        case End.PAUSED if holding.wanted == Status.RUNNING and outcome.pause_reason in set(PauseReason) - {PauseReason.USER}:
            return replace(plain, reason=str(outcome.pause_reason), status=Status.PAUSED, pause_reason=outcome.pause_reason)
    return plain


def _final_step(directory: Path, outcome: Outcome) -> int | None:
    """The step of the whole checkpoint that the outcome names."""
    folder = directory / CHECKPOINTS / (outcome.final_checkpoint or "none")
    return read_manifest(folder).step if folder in published(directory, CHECKPOINTS) else None


def write_conclusion(holding: Holding, conclusion: Conclusion) -> Job:
    """The job after its release. A job that was cancelled or paused meanwhile stays so. Raises: LeaseLost."""
    return holding.write(lambda session: _write(session, holding, conclusion))


def _write(session: Session, holding: Holding, conclusion: Conclusion) -> Job:
    is_running = guard(session, holding.job_id, holding.token).status == Status.RUNNING
    if conclusion.log_end and conclusion.error is not None:
        message = f"The end of the trainer's log (attempt {holding.attempt})"
        data = {"code": conclusion.error.code, "log": conclusion.log_end}
        add_event(session, holding.job_id, level="error", message=message, data=data, attempt=holding.attempt)
    if conclusion.final_step is not None and is_running:
        query = select(Checkpoint).where(Checkpoint.job_id == holding.job_id, Checkpoint.step == conclusion.final_step)
        final_model(session, holding.job_id, holding.token, session.execute(query).scalar_one())
    changes: dict[str, Any] = {"pause_reason": conclusion.pause_reason} if conclusion.pause_reason is not None else {}
    if conclusion.trained_tokens is not None:
        changes["trained_tokens"] = conclusion.trained_tokens
    return release(
        session,
        holding.job_id,
        holding.token,
        max_attempts=holding.worker.settings.max_attempts,
        status=conclusion.status,
        error=conclusion.error,
        reason=conclusion.reason,
        from_step=conclusion.from_step,
        to_step=conclusion.to_step,
        **changes,
    )


def _log_end(directory: Path) -> str:
    path = directory / LOG
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_END_BYTES))
        return file.read().decode(errors="replace")[-LOG_END_CHARACTERS:]
