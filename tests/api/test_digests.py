"""The chain of a job: every step's digest in order, and the hashes of the states that are kept."""

import pytest

from core.run_directory import Manifest
from database.jobs import get_job
from database.models import Checkpoint, ResumePoint, StepDigest
from tests.api.platform import Account, Platform, assert_error

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def digests(owner: Account, platform: Platform) -> str:
    """The path of the chain of a job that did three steps, as its relay and its publisher would have stored them."""
    job_id: str = owner.create_job()["id"]
    with platform.database.transaction() as session:
        get_job(session, owner.project_id, job_id).current_step = 3
        session.add_all(StepDigest(job_id=job_id, step=step, phase="train", digest=f"{step:064x}") for step in (3, 1, 2))
        for step, facts in ((2, {}), (3, {"state_sha256": "c" * 64})):
            manifest = Manifest(kind="checkpoint", step=step, files=[], facts=facts).model_dump()
            name = f"{job_id}:{step}"
            session.add(Checkpoint(id=name, job_id=job_id, step=step, name=name, metrics={}, manifest=manifest, created_at=1.0))
        point = Manifest(kind="resume_point", step=2, files=[], facts={"state_sha256": "b" * 64, "lengths": {}}).model_dump()
        session.add(ResumePoint(id=f"resume_{job_id}", job_id=job_id, step=2, attempt=1, manifest=point, created_at=1.0))
    return f"{JOBS}/{job_id}/digests"


def test_chain_comes_from_the_first_step_on_and_page_by_page(digests: str, owner: Account) -> None:
    first = owner.get(digests, limit=2).json()
    assert [(entry["step"], entry["digest"]) for entry in first["data"]] == [(1, f"{1:064x}"), (2, f"{2:064x}")]
    assert (first["object"], first["has_more"]) == ("list", True)
    assert {entry["object"] for entry in first["data"]} == {"fine_tuning.job.step_digest"}
    rest = owner.get(digests, after=first["last_id"]).json()
    assert ([entry["step"] for entry in rest["data"]], rest["has_more"]) == ([3], False)
    assert owner.get(digests, after=rest["last_id"]).json()["data"] == []


def test_states_are_those_that_have_a_hash(digests: str, owner: Account) -> None:
    assert owner.get(digests).json()["states"] == [
        {"kind": "resume_point", "step": 2, "state_sha256": "b" * 64},
        {"kind": "checkpoint", "step": 3, "state_sha256": "c" * 64},
    ]


@pytest.mark.parametrize("after", ["ftdigest-4", "ftdigest-", "ftdigest-2147483648", "ftsample-1", "1", "ftdigest-\u0661"])
def test_unknown_after_is_refused(after: str, digests: str, owner: Account) -> None:
    assert_error(owner.get(digests, after=after), 400, "invalid_value", "after")


def test_job_without_a_step_has_an_empty_chain(owner: Account) -> None:
    answer = owner.get(f"{JOBS}/{owner.create_job()['id']}/digests").json()
    assert answer == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None, "states": []}
