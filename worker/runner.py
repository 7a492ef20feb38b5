"""One attempt at one job, from the claim to the release: fill the run directory, start the trainer, look after it, conclude.

Never learns anything about training: it reads and writes files, rows and signals.
"""

import logging
import shutil
import time

from core.errors import LeaseLost, PlatformError, StorageError
from core.lifecycle import Status, is_terminal
from core.redaction import Redactor, secret_values, url_secrets
from core.run_directory import End, read_outcome
from database.leases import Claim
from database.models import Job
from worker.conclude import Conclusion, judge, wind_down_reason, write_conclusion
from worker.context import Holding, WindDown, Worker, WorkerFailed
from worker.heartbeat import Heartbeat
from worker.prepare import call_limits, prepare
from worker.publish import Publisher
from worker.relay import InvalidOutput, Relay
from worker.trainer_process import TrainerProcess, oom_kills, start, trainer_environment
from worker.watch import Watch

logger = logging.getLogger("hone.worker")
RELAY_SECONDS = 0.5
REAP_SECONDS = 10.0
"""After SIGKILL. What the kernel does not let die by then is left behind, so that the worker goes on."""

LAST_PUBLISH_SECONDS = 8.0
"""After the end of a cancelled job's trainer, for what it had finished."""


def run_claimed_job(claim: Claim, worker: Worker) -> Job | None:
    """The job after this attempt; None when the lease was lost and another attempt decides."""
    holding = Holding(worker, claim)
    with Heartbeat(holding):
        try:
            job = write_conclusion(holding, _attempt(holding))
        except LeaseLost:
            logger.warning("%s: attempt %d lost its lease and writes nothing more", claim.job.id, claim.attempt)
            return None
    if job.status == Status.SUCCEEDED:
        shutil.rmtree(holding.directory.parent, ignore_errors=True)
    return job


def _attempt(holding: Holding) -> Conclusion:
    """How the attempt ended; everything that it published is in the database. Raises: LeaseLost."""
    try:
        return _train(holding)
    except LeaseLost:
        raise
    except PlatformError as error:
        logger.warning("%s: attempt %d failed: %s", holding.job_id, holding.attempt, error.message)
        return Conclusion(error.code, error=error)
    except Exception as cause:
        logger.exception("%s: attempt %d failed in the worker", holding.job_id, holding.attempt)
        broken = WorkerFailed(f"The worker could not run the job ({type(cause).__name__}).")
        return Conclusion(broken.code, error=broken)


def _train(holding: Holding) -> Conclusion:
    try:
        prepared = prepare(holding)
    except WindDown:
        return Conclusion(wind_down_reason(holding))
    except OSError as error:
        raise StorageError(f"The run directory could not be filled: {error}") from error
    limits = call_limits(holding)
    redactor = Redactor([*secret_values(prepared.secrets), *url_secrets(limits["broker_url"])])
    num_oom_kills = oom_kills()
    relay = Relay(holding, holding.directory, holding.attempt)
    environment = trainer_environment(holding.worker.num_threads)
    process = start(holding.worker.trainer_command, holding.directory, prepared.secrets, environment, limits)
    with Publisher(holding, relay) as publisher:
        exit_code, was_killed = _look_after(holding, process, relay)
        holding.check_owned()
        _bring_in(holding, publisher, relay)
    return judge(holding, exit_code, was_killed, oom_kills() - num_oom_kills, redactor, prepared.from_step)


def _look_after(holding: Holding, process: TrainerProcess, relay: Relay) -> tuple[int | None, bool]:
    """Relays until the trainer has ended, by itself or because the watch ended it; -> exit code and whether the watch killed it."""
    try:
        with Watch(holding, process, time.monotonic()) as watch:
            while not process.has_ended() and not _is_given_up(watch):
                _relay(holding, relay)
                holding.is_lost.wait(RELAY_SECONDS)
    finally:
        exit_code = process.reap(REAP_SECONDS)
    return exit_code, watch.killed_at is not None


def _is_given_up(watch: Watch) -> bool:
    return watch.killed_at is not None and time.monotonic() - watch.killed_at > REAP_SECONDS


def _relay(holding: Holding, relay: Relay) -> None:
    try:
        relay.forward_new_lines()
    except InvalidOutput as error:
        holding.fail(error)
    except LeaseLost:
        holding.is_lost.set()


def _bring_in(holding: Holding, publisher: Publisher, relay: Relay) -> None:
    """The last lines, checkpoints and the resume point, if the job may still need it. Raises: LeaseLost, StorageError."""
    if holding.wanted == Status.CANCELLED:
        holding.publish_by = time.monotonic() + LAST_PUBLISH_SECONDS
    try:
        relay.forward_new_lines()
        publisher.publish_checkpoints()
        if not _is_over(holding):
            publisher.publish_resume_point()
    except InvalidOutput as error:
        holding.fail(error)
    except StorageError as error:
        if holding.wanted != Status.CANCELLED:
            raise
        logger.warning("%s: %s", holding.job_id, error.message)


def _is_over(holding: Holding) -> bool:
    """Whether no later attempt will go on from here."""
    outcome = read_outcome(holding.directory)
    is_done = outcome is not None and (outcome.end == End.SUCCEEDED or (outcome.end == End.FAILED and not outcome.retryable))
    return is_terminal(holding.wanted) or (is_done and holding.wanted == Status.RUNNING)
