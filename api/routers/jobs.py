"""Fine-tuning jobs: create, watch, cancel."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy.orm import Session

from api.auth import JobReader, JobWriter
from api.bodies import JsonBody, documents
from api.pagination import After, Limit, ListPage, list_page
from api.requests import CreateJobBody
from api.schemas import DigestPage, Job, JobCheckpoint, JobEvent, MetricList, Sample
from api.services import Services, get_services
from api.submission import submit_job
from api.views import (
    DIGEST_PREFIX,
    Version,
    checkpoint_view,
    digest_view,
    event_view,
    job_view,
    metric_view,
    registered_versions,
    sample_view,
    state_view,
)
from core.errors import InvalidRequest
from database import models
from database.checkpoints import list_checkpoints, list_states
from database.jobs import cancel_job, get_job, list_jobs
from database.progress import SAMPLE_PREFIX, list_digests, list_events, list_metrics, list_samples
from database.reports import newest_tests

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"])
HasServices = Annotated[Services, Depends(get_services)]
MAX_NUMBER = 2**53
MAX_STEP = 2**31 - 1
MAX_METADATA_PAIRS = 16
Number = Annotated[int, Query(ge=0, le=MAX_NUMBER)]
Reward = Annotated[float | None, Query(allow_inf_nan=False)]

EXAMPLE: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct",
    "training_file": "file-abc123",
    "method": {
        "type": "reinforcement",
        "reinforcement": {
            "grader": {"type": "endpoint", "grader_id": "grader_abc123"},
            "algorithm": "grpo",
            "hyperparameters": {"n_epochs": 2, "batch_size": 16, "group_size": 8, "kl_coefficient": 0.02},
        },
    },
    "suffix": "arithmetic",
}


@router.post("", openapi_extra=documents(CreateJobBody, grpo=EXAMPLE))
async def create_job(body: JsonBody, caller: JobWriter, services: HasServices) -> Job:
    """Submits a job. Its files are read afterwards, while its status is `validating_files`."""
    return await to_thread.run_sync(partial(_create, services, caller.project_id, body), limiter=services.submissions)


@router.get("")
def list_all_jobs(request: Request, caller: JobReader, services: HasServices, after: After = None, limit: Limit = 20) -> ListPage[Job]:
    """The project's jobs, newest first. `metadata[key]=value` keeps those with all given pairs, `metadata=null` those without any."""
    with services.database.reading() as session:
        page = list_jobs(session, caller.project_id, after=after, limit=limit, metadata=_metadata_filter(request))
        tests = _tests(session, page.items)
        return list_page(page, lambda job: job_view(job, services.settings.organization_id, tests))


@router.get("/{job_id}")
def retrieve_job(job_id: str, caller: JobReader, services: HasServices) -> Job:
    """One job as it stands."""
    with services.database.reading() as session:
        return _shown(session, services, get_job(session, caller.project_id, job_id))


@router.post("/{job_id}/cancel")
def cancel(job_id: str, caller: JobWriter, services: HasServices) -> Job:
    """Cancels at once, as far as the status goes; a running trainer stops within 45 seconds. Checkpoints stay."""
    with services.database.transaction() as session:
        return _shown(session, services, cancel_job(session, caller.project_id, job_id))


@router.get("/{job_id}/events")
def list_job_events(job_id: str, caller: JobReader, services: HasServices, after: After = None, limit: Limit = 20) -> ListPage[JobEvent]:
    """What happened, newest first."""
    with services.database.reading() as session:
        get_job(session, caller.project_id, job_id)
        return list_page(list_events(session, job_id, after=after, limit=limit), event_view)


@router.get("/{job_id}/checkpoints")
def list_job_checkpoints(
    job_id: str, caller: JobReader, services: HasServices, after: After = None, limit: Limit = 10
) -> ListPage[JobCheckpoint]:
    """Weights that can be sampled from, newest first."""
    with services.database.reading() as session:
        get_job(session, caller.project_id, job_id)
        return list_page(list_checkpoints(session, job_id, after=after, limit=limit), checkpoint_view)


@router.get("/{job_id}/metrics")
def list_job_metrics(
    job_id: str,
    caller: JobReader,
    services: HasServices,
    after: Number = 0,
    names: Annotated[str | None, Query(max_length=4096, description="Separated by commas; all when absent.")] = None,
    max_points: Annotated[int | None, Query(ge=1, le=10_000, description="Thins every curve to at most so many points.")] = None,
) -> MetricList:
    """Points in the order in which they were stored. Poll with `after` = the answer's `last_seq`."""
    wanted = names.split(",") if names else None
    with services.database.reading() as session:
        get_job(session, caller.project_id, job_id)
        page = list_metrics(session, job_id, after=after, names=wanted, max_points=max_points)
        data = [metric_view(metric) for metric in page.items]
    return MetricList(data=data, has_more=page.has_more, last_seq=data[-1].seq if data else after)


@router.get("/{job_id}/digests")
def list_job_digests(job_id: str, caller: JobReader, services: HasServices, after: After = None, limit: Limit = 100) -> DigestPage:
    """The chained digest of every step that is done, first step first: with it anyone can check that two jobs are the same run."""
    with services.database.reading() as session:
        get_job(session, caller.project_id, job_id)
        step = _number_of(after, DIGEST_PREFIX, MAX_STEP)
        page = list_page(list_digests(session, job_id, after=step, limit=limit), digest_view)
        return DigestPage(**dict(page), states=[state_view(manifest) for manifest in list_states(session, job_id)])


@router.get("/{job_id}/samples")
def list_job_samples(
    job_id: str,
    caller: JobReader,
    services: HasServices,
    step: Annotated[int | None, Query(ge=0, le=MAX_STEP)] = None,
    phase: Literal["train", "valid"] | None = None,
    status: Annotated[Literal["graded", "abstained", "failed"] | None, Query(description="What became of the grade.")] = None,
    error: Annotated[str | None, Query(max_length=64, description="The code of a grade that failed.")] = None,
    grader_version: Annotated[str | None, Query(max_length=256)] = None,
    order: Annotated[Literal["seq", "reward", "-reward"], Query(description="As stored, or by reward from the lowest or highest.")] = "seq",
    min_reward: Reward = None,
    max_reward: Reward = None,
    after: After = None,
    limit: Limit = 20,
) -> ListPage[Sample]:
    """Prompts and completions with their grades; those without a grade come last when ordered by reward."""
    with services.database.reading() as session:
        get_job(session, caller.project_id, job_id)
        page = list_samples(
            session,
            job_id,
            step=step,
            phase=phase,
            status=status,
            error=error,
            grader_version=grader_version,
            order=order,
            min_reward=min_reward,
            max_reward=max_reward,
            after=_number_of(after, SAMPLE_PREFIX, MAX_NUMBER),
            limit=limit,
        )
        return list_page(page, sample_view)


def _create(services: Services, project_id: str, body: Any) -> Job:
    job = submit_job(services, project_id, body)
    with services.database.reading() as session:
        return _shown(session, services, job)


def _shown(session: Session, services: Services, job: models.Job) -> Job:
    return job_view(job, services.settings.organization_id, _tests(session, [job]))


def _tests(session: Session, jobs: Sequence[models.Job]) -> dict[Version, models.GraderReport]:
    """The newest test of every registered grader's version that one of `jobs` uses."""
    return newest_tests(session, [version for job in jobs for version in registered_versions(job)])


def _number_of(after: str | None, prefix: str, largest: int) -> int | None:
    """The number behind `prefix` in an id. Raises: InvalidRequest."""
    if after is None:
        return None
    digits = after.removeprefix(prefix)
    if digits == after or not (digits.isascii() and digits.isdecimal()) or int(digits) > largest:
        raise InvalidRequest(f"'after' is {after!r}; it must be an id of this list, such as '{prefix}12'.", param="after")
    return int(digits)


def _metadata_filter(request: Request) -> dict[str, str] | Literal["null"] | None:
    """`metadata[key]=value` pairs as a dict, "null" for `metadata=null`, None without either. Raises: InvalidRequest."""
    pairs = {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in request.query_params.multi_items()
        if key.startswith("metadata[") and key.endswith("]")
    }
    if len(pairs) > MAX_METADATA_PAIRS:
        raise InvalidRequest(f"'metadata' may hold at most {MAX_METADATA_PAIRS} pairs.", param="metadata")
    if pairs:
        return pairs
    plain = request.query_params.get("metadata")
    if plain not in (None, "null"):
        raise InvalidRequest("'metadata' must be given as metadata[key]=value, or as metadata=null.", param="metadata")
    return "null" if plain == "null" else None
