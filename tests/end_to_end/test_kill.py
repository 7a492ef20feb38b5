"""SIGKILL in the middle: the worker with its trainer, then a trainer alone. The job must end as if nothing had happened."""

import os
import signal
from collections import Counter
from pathlib import Path

from tests.end_to_end.story import MODEL, OPTIONS, SignedGrader, read_metrics, register, submit
from tests.local.trees import alive_with
from tests.platform import Platform, run_platform

STEPS = 6


def current_step(platform: Platform, job_id: str) -> int:
    return int(platform.request("GET", f"/v1/fine_tuning/jobs/{job_id}")["current_step"] or 0)


def test_killed_worker_and_killed_trainer_cost_no_row_and_double_none(tmp_path: Path, valkey_url: str) -> None:
    grader = SignedGrader()
    grader.held_step = 3
    quick = {"HONE_LEASE_SECONDS": "4"}
    with grader.endpoint, run_platform(tmp_path / "home", broker_url=valkey_url, environment=quick) as platform:
        grader_id = register(platform, grader, tmp_path / MODEL)
        job_id = submit(platform.client(), grader_id, max_steps=STEPS, eval_interval=STEPS, checkpoint_interval=3).id
        runs = str(platform.home / "runs" / job_id)
        platform.wait("step 2", lambda: current_step(platform, job_id) >= 2, 90)
        platform.kill("worker1")
        platform.wait("the trainer's death with its worker", lambda: alive_with(runs) == [], 10)
        grader.held_step = 5
        platform.start_worker("worker2")
        platform.wait("the second attempt's steps", lambda: current_step(platform, job_id) >= 4, 90)
        (trainer,) = alive_with(runs)
        grader.held_step = None
        os.kill(trainer, signal.SIGKILL)
        job = platform.wait_for_end(job_id)
        assert (job.status, job.error) == ("succeeded", None), platform.logs()
        assert platform.request("GET", f"/v1/fine_tuning/jobs/{job_id}")["attempt"] == 3
        told = [(point["step"], point["name"]) for point in read_metrics(platform, job_id) if point["phase"] == "train"]
        points = Counter((step, name) for step, name in told if not name.startswith("seconds_"))
        names = {name for _, name in points}
        assert "reward_mean" in names
        assert points == Counter((step, name) for step in range(1, STEPS + 1) for name in names)
        for step in range(1, STEPS + 1):
            samples = platform.request("GET", f"/v1/fine_tuning/jobs/{job_id}/samples?step={step}&phase=train&limit=100")["data"]
            assert len(samples) == OPTIONS["batch_size"] * OPTIONS["group_size"]
        messages = [event.message for event in platform.client().fine_tuning.jobs.list_events(job_id, limit=100)]
        assert not [message for message in messages if "otherwise than the attempt before" in message]
