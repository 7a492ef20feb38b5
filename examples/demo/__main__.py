"""`python -m examples.demo`: from nothing to a better model. Exits 0 only when the held-out reward rose as it should."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from client.client import Client
from core.grader_specs import EndpointOptions
from examples.demo import programs, report, settings
from examples.demo.comparison import Comparison, compare, row_rewards
from examples.demo.programs import DemoFailed, Programs
from examples.demo.progress import follow
from examples.demo.prompts import Row, as_jsonl, make_rows
from local.models import SMOLLM2_NAME

LIMIT_SECONDS = 3600.0
DRY_HELD_OUT = 8


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--algorithm", choices=sorted(settings.PLANS), default="grpo")
    parser.add_argument("--steps", type=int, help="try the path with so many steps and few held-out rows; nothing is judged")
    parser.add_argument("--keep", action="store_true", help="keep the home with database and checkpoint, and say where it is")
    return parser.parse_args()


def register_grader(client: Client, started: Programs) -> str:
    """The id of the grader, which runs and knows its signing secret."""
    port = programs.free_port()
    url = f"http://127.0.0.1:{port}/grade"
    grader = client.graders.create("addition", EndpointOptions(url=url, timeout_seconds=30, reward_range=(0.0, 1.0)))
    programs.start_grader(started, port, grader["signing_secret"])
    return str(grader["id"])


def make_method(grader_id: str, algorithm: str, steps: int | None) -> dict[str, Any]:
    reinforcement = {
        "grader": {"type": "endpoint", "grader_id": grader_id},
        "algorithm": algorithm,
        "hyperparameters": settings.hyperparameters(algorithm, steps),
    }
    return {"type": "reinforcement", "reinforcement": reinforcement}


def submit(base_url: str, key: str, method: dict[str, Any], training: list[Row], held_out: list[Row]) -> str:
    """The job's id. This is the official client, unmodified."""
    openai = OpenAI(base_url=base_url, api_key=key, timeout=60)
    files = [
        openai.files.create(file=(name, as_jsonl(rows)), purpose="fine-tune")
        for name, rows in (("train.jsonl", training), ("held_out.jsonl", held_out))
    ]
    job = openai.fine_tuning.jobs.create(
        model=SMOLLM2_NAME,
        training_file=files[0].id,
        validation_file=files[1].id,
        method=method,  # type: ignore[arg-type]
        seed=settings.SEED,
        suffix="demo",
    )
    return job.id


def tell(client: Client, job: dict[str, Any], held_out: list[Row], method: dict[str, Any]) -> Comparison:
    """Prints the result of the finished job and returns it."""
    job_id, last = job["id"], job["total_steps"]
    before, after = (list(client.jobs.every_sample(job_id, step=step, phase="valid")) for step in (0, last))
    comparison = compare(*(row_rewards(samples, settings.EVAL_SAMPLES) for samples in (before, after)))
    points = client.jobs.metrics(job_id, names=["valid_greedy_reward_mean"])["data"]
    greedy = {point["step"]: point["value"] for point in points if point["phase"] == "valid"}
    for line in report.score_lines(comparison):
        say(line)
    say(f"greedy held-out reward: {greedy[0]:.3f} -> {greedy[last]:.3f}")
    say()
    for line in report.example_lines(held_out, before, after):
        say(line)
    checkpoints = client.jobs.checkpoints(job_id)["data"]
    say(f"\ncheckpoint: {checkpoints[0]['fine_tuned_model_checkpoint']}")
    say(f"model: {job['fine_tuned_model']}")
    shown = {**method, "reinforcement": {**method["reinforcement"], "grader": {"type": "endpoint", "grader_id": "grader_..."}}}
    body = {"model": SMOLLM2_NAME, "training_file": "file-...", "method": shown}
    say(report.BY_HAND.replace("{job}", json.dumps(body)).replace("{model}", SMOLLM2_NAME).replace("{method}", repr(shown)))
    return comparison


def judge(comparison: Comparison, algorithm: str) -> None:
    """Raises: DemoFailed when the rise is too small or may be chance."""
    least = settings.PLANS[algorithm].least_rise
    if comparison.rise < least:
        raise DemoFailed(f"the held-out reward rose by {comparison.rise:.3f}, less than {least}.")
    if comparison.lower <= 0:
        raise DemoFailed(f"the rise may be chance: the interval begins at {comparison.lower:+.3f}.")


def run(arguments: argparse.Namespace, started: Programs, folder: Path) -> None:
    begin = time.monotonic()
    training, held_out = make_rows()
    if arguments.steps is not None:
        held_out = held_out[:DRY_HELD_OUT]
    say(f"{len(training)} questions to train on, {len(held_out)} held out; none in both.")
    url, key = programs.start_platform(started, folder / "home")
    say(f"hone up answers at {url}")
    programs.add_model(started, url, key, folder / "home")
    say(f"model {SMOLLM2_NAME} is registered")
    with Client(f"{url}/v1", key) as client:
        method = make_method(register_grader(client, started), arguments.algorithm, arguments.steps)
        say("the grader runs as a process of its own and verifies signatures")
        job_id = submit(f"{url}/v1", key, method, training, held_out)
        job = follow(client, job_id, method["reinforcement"]["hyperparameters"]["max_steps"], LIMIT_SECONDS)
        comparison = tell(client, job, held_out, method)
    say(f"{arguments.algorithm}: {time.monotonic() - begin:.0f} s in all")
    if arguments.steps is not None:
        say("--steps was given: the result is not judged.")
    else:
        judge(comparison, arguments.algorithm)


def main() -> int:
    arguments = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="hone-demo-"))
    started = Programs(folder)
    exit_code = 1
    try:
        run(arguments, started, folder)
        exit_code = 0
    except KeyboardInterrupt:
        say("\nInterrupted.")
        exit_code = 130
    except DemoFailed as error:
        say(f"\nThe demo failed: {error}")
    finally:
        started.stop()
        if arguments.keep:
            say(f"kept: {folder}; go on with: hone up --home {folder / 'home'}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
