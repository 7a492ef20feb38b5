"""Asks the graders of jobs that paused for them, and queues a job again once its grader has graded something.

The answer is thrown away: a probe is no sample, and nothing is trained on it. It goes the way of every grade: signed, and only to
addresses that are allowed.
"""

import asyncio
import json
import logging
import threading
from typing import Any

from pydantic import TypeAdapter

from core.errors import PlatformError
from core.grader_specs import PinnedGraderSpec
from core.rows import parse_row
from database.graders import read_job_secrets
from database.models import Job
from database.probes import graded_sample, put_off_probe, resume_probed, take_probe
from database.secrets import Secrets
from graders.build import build_grader
from graders.grade import Grade, GradeRequest
from graders.outage import probe_request
from housekeeping.context import Housekeeping
from housekeeping.rows import iter_lines
from outbound.safe_http import NetworkPolicy

logger = logging.getLogger("hone.housekeeping")
MAX_SECONDS = 120.0
"""For one probe with all its attempts."""

MAX_AT_ONCE = 16
_PINNED: TypeAdapter[Any] = TypeAdapter(PinnedGraderSpec)


class GraderProbe:
    """One per process."""

    def __init__(self, housekeeping: Housekeeping, secrets: Secrets) -> None:
        self._housekeeping, self._secrets = housekeeping, secrets
        self._network = NetworkPolicy(housekeeping.settings.allowed_private_networks, housekeeping.settings.allow_http_graders)
        self._lock = threading.Lock()

    def run(self) -> int:
        """Probes for every job whose turn it is; how many went back to the queue. Returns at once where another thread is at it."""
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            resumed = 0
            while jobs := self._take():
                resumed += sum(asyncio.run(self._probe_all(jobs)))
            return resumed
        finally:
            self._lock.release()

    def _take(self) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < MAX_AT_ONCE:
            with self._housekeeping.database.transaction() as session:
                job = take_probe(session, claim_seconds=2 * MAX_SECONDS)
            if job is None:
                break
            jobs.append(job)
        return jobs

    async def _probe_all(self, jobs: list[Job]) -> list[bool]:
        return await asyncio.gather(*map(self._probe, jobs))

    async def _probe(self, job: Job) -> bool:
        """Whether `job` is queued now."""
        why = await self._ask(job)
        probe_seconds = self._housekeeping.settings.grader_probe_seconds
        with self._housekeeping.database.transaction() as session:
            if why is not None:
                put_off_probe(session, job, why, probe_seconds)
                return False
            is_queued = resume_probed(session, job, probe_seconds)
        if is_queued:
            self._housekeeping.doorbell.wake_worker()
        return is_queued

    async def _ask(self, job: Job) -> str | None:
        """Why the grader is not back; None when it graded."""
        try:
            async with asyncio.timeout(MAX_SECONDS):
                grade = await self._grade(job)
        except TimeoutError:
            return f"no answer within {MAX_SECONDS:g} s."
        except PlatformError as error:
            return error.message
        except Exception:
            logger.exception("%s: the probe of its grader broke", job.id)
            return "the probe could not be sent."
        return None if grade.error is None else f"{grade.error}: {grade.error_message}"

    async def _grade(self, job: Job) -> Grade:
        with self._housekeeping.database.reading() as session:
            secrets = read_job_secrets(session, self._secrets, job)
        grader = build_grader(_PINNED.validate_python(job.grader), secrets, self._network, self._housekeeping.limits(job.project_id))
        try:
            return await grader.grade(self._question(job))
        finally:
            await grader.close()

    def _question(self, job: Job) -> GradeRequest:
        """The newest completion that was graded, with its row; else an empty one of the first row."""
        with self._housekeeping.database.reading() as session:
            sample = graded_sample(session, job.id)
        index = 0 if sample is None else sample.prompt_index
        text = "" if sample is None else sample.completion
        lines = iter_lines(self._housekeeping.blobs.read(job.training_blob), "training_file")
        number, line = next(line for place, line in enumerate(lines) if place == index)
        item = parse_row(line, number, "training_file").item
        metadata = {"job_id": job.id, "step": job.current_step or 0, "attempt": job.attempt}
        return probe_request(GradeRequest(item, text, output_json=_as_json(job, text), metadata=metadata))


def _as_json(job: Job, text: str) -> Any | None:
    """What the trainer would send beside the text."""
    if job.response_format is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
