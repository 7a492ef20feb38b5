"""Four jobs on two workers share one grader: its limit holds over all of them, counted where it matters."""

from pathlib import Path

from tests.end_to_end.story import MODEL, SignedGrader, register, submit
from tests.graders.test_limits import CountingServer
from tests.platform import run_platform


def test_four_jobs_on_two_workers_keep_the_limit_of_the_grader_they_share(redis_url: str, tmp_path: Path) -> None:
    with CountingServer(0.05) as server, run_platform(tmp_path / "home", broker_url=redis_url, workers=2) as platform:
        grader = SignedGrader()
        with grader.endpoint:
            grader_id = register(platform, grader, tmp_path / MODEL)
        platform.request("POST", f"/v1/graders/{grader_id}", {"url": server.url, "max_concurrency": 1})
        client = platform.client()
        server.go.clear()
        jobs = [submit(client, grader_id, max_steps=2, eval_interval=2) for _ in range(4)]
        platform.wait("two jobs at the grader", lambda: sum(_status(client, job.id) == "running" for job in jobs) == 2, 60)
        platform.wait("a call", lambda: server.open == 1, 60)
        server.go.set()
        assert [platform.wait_for_end(job.id).status for job in jobs] == ["succeeded"] * 4, platform.logs()
    assert server.most_open == 1
    assert len(server.arrivals) >= 4 * 2 * 4


def _status(client: object, job_id: str) -> str:
    return str(client.fine_tuning.jobs.retrieve(job_id).status)  # type: ignore[attr-defined]
