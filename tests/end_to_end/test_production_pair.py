"""The same path on the servers of a real installation: PostgreSQL and Redis."""

from pathlib import Path

import psycopg

from tests.end_to_end.story import MODEL, SignedGrader, read_metrics, register, submit
from tests.platform import run_platform


def test_job_goes_all_the_way_on_postgresql_and_redis(postgres_url: str, redis_url: str, tmp_path: Path) -> None:
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True, connect_timeout=5) as connection:
        connection.execute("CREATE DATABASE end_to_end")
    database_url = postgres_url.removesuffix("/postgres") + "/end_to_end"
    grader = SignedGrader()
    with grader.endpoint, run_platform(tmp_path / "home", broker_url=redis_url, database_url=database_url) as platform:
        grader_id = register(platform, grader, tmp_path / MODEL)
        client = platform.client()
        job = platform.wait_for_end(submit(client, grader_id).id)
        assert (job.status, job.error) == ("succeeded", None), platform.logs()
        assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
        assert [checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id).data] == [4, 2]
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        assert events[0].message == "The job has successfully completed"
        assert events[-1].message == f"Created fine-tuning job: {job.id}"
        steps = [point["step"] for point in read_metrics(platform, job.id) if (point["phase"], point["name"]) == ("train", "reward_mean")]
        assert steps == [1, 2, 3, 4]
        assert grader.refused == []
        assert not (platform.home / "hone.db").exists()
