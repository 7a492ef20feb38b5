import hashlib

import pytest
from sqlalchemy import select, update

from core.errors import InvalidRequest, LeaseLost
from core.lifecycle import Status
from database.base_models import get_model, list_models
from database.blobs import BlobInfo
from database.checkpoints import (
    checkpoint_files,
    drop_resume_points,
    final_model,
    list_checkpoints,
    newest_resume_point,
    publish_checkpoint,
    publish_resume_point,
    resume_point_files,
)
from database.leases import release
from database.models import Job, ResumePointFile
from database.progress import list_events
from tests.database.rows import make_running, manifest, read_job

FILES = [("model.safetensors", BlobInfo("blob_m", 9, "a" * 64)), ("config.json", BlobInfo("blob_c", 2, "b" * 64))]


def publish(database, held, step, keep=9, files=FILES, token=None, **metrics):
    with database.transaction() as session:
        return publish_checkpoint(
            session, held.job.id, token or held.token, step=step, manifest=manifest(step, **metrics), files=files, keep=keep
        )


def steps(database, held):
    with database.reading() as session:
        return [checkpoint.step for checkpoint in list_checkpoints(session, held.job.id, after=None, limit=50).items]


def test_a_checkpoint_has_its_models_name_its_files_and_an_event(database):
    _, held = make_running(database, suffix="try-1")
    checkpoint = publish(database, held, 2, valid_reward_mean=0.5)
    with database.reading() as session:
        files = [(file.name, file.blob) for file in checkpoint_files(session, checkpoint.id)]
        newest = list_events(session, held.job.id, after=None, limit=1).items[0]
    assert checkpoint.name == f"ft:tiny:team:try-1:{held.job.id[-8:]}:ckpt-step-2"
    assert checkpoint.id.startswith("ftckpt_")
    assert checkpoint.metrics == {"valid_reward_mean": 0.5}
    assert files == [("config.json", "blob_c"), ("model.safetensors", "blob_m")]
    assert newest.message == "Checkpoint created at step 2"


def test_the_newest_and_the_best_of_the_others_stay(database):
    _, held = make_running(database)
    for step, reward in ((1, 0.9), (2, 0.1), (3, 0.5)):
        publish(database, held, step, keep=2, valid_reward_mean=reward)
    assert steps(database, held) == [3, 1]
    publish(database, held, 4, keep=2)
    assert steps(database, held) == [4, 1]
    publish(database, held, 5, keep=1)
    assert steps(database, held) == [5]


def test_a_step_published_again_is_replaced_under_the_same_id_and_told_once(database):
    _, held = make_running(database)
    first = publish(database, held, 2)
    second = publish(database, held, 2, files=FILES[:1], train_reward_mean=1.0)
    with database.reading() as session:
        files = checkpoint_files(session, first.id)
        told = [event.message for event in list_events(session, held.job.id, after=None, limit=50).items]
    assert (second.id, second.metrics) == (first.id, {"train_reward_mean": 1.0})
    assert [file.name for file in files] == ["model.safetensors"]
    assert told.count("Checkpoint created at step 2") == 1


def test_checkpoints_page_by_step_and_refuse_an_unknown_after(database):
    _, held = make_running(database)
    made = [publish(database, held, step) for step in (2, 4, 6)]
    with database.reading() as session:
        page = list_checkpoints(session, held.job.id, after=made[2].id, limit=1)
        assert ([checkpoint.step for checkpoint in page.items], page.has_more) == ([4], True)
        with pytest.raises(InvalidRequest) as caught:
            list_checkpoints(session, held.job.id, after="ftckpt_no", limit=1)
    assert caught.value.param == "after"


def test_a_lost_lease_publishes_nothing(database):
    _, held = make_running(database)
    checkpoint = publish(database, held, 1)
    calls = [
        lambda session: publish_checkpoint(session, held.job.id, "old", step=2, manifest=manifest(), files=FILES, keep=3),
        lambda session: publish_resume_point(session, held.job.id, "old", step=2, manifest=manifest(), files=FILES),
        lambda session: final_model(session, held.job.id, "old", checkpoint),
    ]
    for call in calls:
        with pytest.raises(LeaseLost), database.transaction() as session:
            call(session)
    assert steps(database, held) == [1]
    with database.reading() as session:
        assert newest_resume_point(session, held.job.id) is None


def test_the_final_model_is_found_by_its_project_and_its_checkpoint_outlives_the_rest(database):
    project, held = make_running(database)
    best = publish(database, held, 1, valid_reward_mean=0.1)
    with database.transaction() as session:
        model = final_model(session, held.job.id, held.token, best)
    publish(database, held, 2, keep=1, valid_reward_mean=0.9)
    publish(database, held, 3, keep=1, valid_reward_mean=0.9)
    lines = "".join(f"{blob.sha256}  {name}\n" for name, blob in sorted(FILES))
    with database.reading() as session:
        found = get_model(session, project, f"ft:tiny:team::{held.job.id[-8:]}")
    assert (found.id, found.job_id, found.checkpoint_id, found.kind) == (model.id, held.job.id, best.id, "fine_tuned")
    assert found.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert read_job(database, held.job.id).fine_tuned_model == found.name
    assert steps(database, held) == [3, 1]


def test_an_attempt_that_comes_to_the_end_again_moves_the_model_to_its_own_checkpoint(database):
    project, held = make_running(database)
    first, second = publish(database, held, 1), publish(database, held, 2)
    with database.transaction() as session:
        final_model(session, held.job.id, held.token, first)
    with database.transaction() as session:
        final_model(session, held.job.id, held.token, second)
    with database.reading() as session:
        assert [model.checkpoint_id for model in list_models(session, project)] == [second.id]


def test_a_resume_point_replaces_the_older_and_clears_the_failures(database):
    _, held = make_running(database)
    with database.transaction() as session:
        session.execute(update(Job).values(failures=2))
    for step in (2, 4):
        with database.transaction() as session:
            publish_resume_point(session, held.job.id, held.token, step=step, manifest=manifest(step, "resume_point"), files=FILES)
    with database.reading() as session:
        point = newest_resume_point(session, held.job.id)
        assert [file.blob for file in resume_point_files(session, point.id)] == ["blob_c", "blob_m"]
        assert len(session.execute(select(ResumePointFile)).all()) == 2
    assert (point.step, point.attempt, read_job(database, held.job.id).failures) == (4, 1, 0)


def test_resume_points_go_with_the_end_of_the_job(database):
    _, held = make_running(database)
    with database.transaction() as session:
        publish_resume_point(session, held.job.id, held.token, step=2, manifest=manifest(2, "resume_point"), files=FILES)
        drop_resume_points(session, held.job.id)
        assert newest_resume_point(session, held.job.id) is None
        publish_resume_point(session, held.job.id, held.token, step=3, manifest=manifest(3, "resume_point"), files=FILES)
        release(session, held.job.id, held.token, max_attempts=3, status=Status.SUCCEEDED, reason="done")
        assert newest_resume_point(session, held.job.id) is None
        assert session.execute(select(ResumePointFile)).all() == []
