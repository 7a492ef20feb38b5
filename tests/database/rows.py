"""Rows to start a test from, made by the functions under test."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from sqlalchemy import update

from core.grader_specs import StringCheckGrader
from core.options import Options
from core.run_directory import FileEntry, Manifest, MetricsLine, SampleLine
from database.jobs import NewJob, insert_job, mark_validated
from database.leases import claim_job
from database.models import Job
from database.projects import create_project

GRADER = StringCheckGrader(type="string_check", input="{{sample.output_text}}", reference="{{item.answer}}", operation="eq")


def make_project(session, name="team"):
    return create_project(session, name).id


def new_job(project_id, **changes):
    values = {
        "project_id": project_id,
        "model": "tiny",
        "model_digest": "d" * 64,
        "training_file": "file-a",
        "training_blob": "blob_a",
        "request": {"model": "tiny"},
        "algorithm": "grpo",
        "options": Options(),
        "grader": GRADER,
        "seed": 7,
    }
    return NewJob(**(values | changes))


def make_queued(session, project_id, **changes):
    job = insert_job(session, new_job(project_id, **changes))
    assert mark_validated(session, job.id, num_training_rows=12, num_validation_rows=3, validation_blob=None, total_steps=6)
    return job.id


def claim(session, worker="w1", gpu_class="any", lease_seconds=60.0):
    return claim_job(session, worker=worker, host="h", device="cpu", gpu_class=gpu_class, lease_seconds=lease_seconds)


def make_running(database, **changes):
    """(job id, claim) of a job in a project of its own."""
    with database.transaction() as session:
        project = make_project(session)
        job_id = make_queued(session, project, **changes)
        claimed = claim(session)
    assert claimed is not None
    assert claimed.job.id == job_id
    return project, claimed


def write_old_deadline(database, job_id):
    """The lease passes without anybody waiting for it."""
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=1.0))


def read_job(database, job_id):
    with database.reading() as session:
        return session.get(Job, job_id)


def manifest(step=2, kind="checkpoint", **metrics):
    return Manifest(kind=kind, step=step, files=[FileEntry(name="w", bytes=1, sha256="0" * 64)], metrics=metrics)


def metrics_line(step, phase="train", digest="", **values):
    return MetricsLine(step=step, phase=phase, values=values, digest=digest, total_steps=6)


def sample_line(step, g, reward, **changes):
    values = {"step": step, "phase": "train", "prompt_index": 0, "g": g, "prompt": "2+2?", "completion": "4", "reward": reward}
    values |= {"finish_reason": "stop", "num_tokens": 2, "grader_version": "inline"}
    return SampleLine(**(values | changes))


def in_threads(functions):
    """What each of `functions` returns, run at the same time; raises what one of them raised."""
    barrier = Barrier(len(functions))

    def start_together(function):
        barrier.wait(timeout=10)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(start_together, functions, timeout=60))
