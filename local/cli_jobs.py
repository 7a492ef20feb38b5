"""`hone jobs`: submit, watch and cancel fine-tuning jobs."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from client.client import Client
from client.transport import Object
from core.errors import InvalidRequest
from local.connection import connect

commands = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)
FINAL = ("succeeded", "failed", "cancelled")
SHOWN_METRICS = ("reward_mean", "valid_reward_mean", "kl_reference", "kl_old", "tokens_per_second")
POLL_SECONDS = 1.0


@commands.command("create")
def create(
    file: Annotated[Path, typer.Argument(help="The body of POST /v1/fine_tuning/jobs as JSON.", exists=True, dir_okay=False)],
    train: Annotated[Path | None, typer.Option(help="Upload this file and use it as training_file.", exists=True, dir_okay=False)] = None,
    valid: Annotated[Path | None, typer.Option(help="Upload this file and use it as validation_file.", exists=True, dir_okay=False)] = None,
    grader: Annotated[str | None, typer.Option(help="Use this registered grader.")] = None,
) -> None:
    """Submits a job; prints its id."""
    request = read_request(file)
    with connect() as client:
        if train:
            request["training_file"] = client.files.upload(train)["id"]
        if valid:
            request["validation_file"] = client.files.upload(valid)["id"]
        if grader:
            use_grader(request, grader)
        typer.echo(client.jobs.create(request)["id"])


def use_grader(request: Object, grader_id: str) -> None:
    """Puts a registered grader into the request. Raises: InvalidRequest."""
    try:
        request["method"]["reinforcement"]["grader"] = {"type": "endpoint", "grader_id": grader_id}
    except (KeyError, TypeError) as error:
        raise InvalidRequest("--grader needs a request with method.reinforcement.", param="method") from error


def read_request(file: Path) -> Object:
    """Raises: InvalidRequest."""
    try:
        request = json.loads(file.read_text())
    except ValueError as error:
        raise InvalidRequest(f"{file} is not JSON: {error}.") from error
    if not isinstance(request, dict):
        raise InvalidRequest(f"{file} must hold a JSON object.")
    return request


@commands.command("list")
def list_jobs(limit: Annotated[int, typer.Option(min=1, max=100)] = 20) -> None:
    """The newest jobs, newest first."""
    with connect() as client:
        for job in client.jobs.list(limit=limit)["data"]:
            typer.echo(describe(job))


def describe(job: Object) -> str:
    progress = f"step {job['current_step'] or 0} of {job['total_steps']}" if job.get("total_steps") else ""
    return "  ".join(part for part in (job["id"], job["status"], job["model"], progress, job.get("fine_tuned_model") or "") if part)


@commands.command("show")
def show(job_id: str) -> None:
    """The job as JSON."""
    with connect() as client:
        typer.echo(json.dumps(client.jobs.retrieve(job_id), indent=2))


@commands.command("cancel")
def cancel(job_id: str) -> None:
    """Cancels a job that has not ended; a running one leaves its device within 45 seconds."""
    with connect() as client:
        typer.echo(describe(client.jobs.cancel(job_id)))


@commands.command("events")
def events(job_id: str, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False) -> None:
    """What happened, oldest first. With --follow the exit code is 0 only when the job succeeds."""
    seen: set[str] = set()
    with connect() as client:
        while True:
            status = str(client.jobs.retrieve(job_id)["status"])
            for event in reversed(unseen_events(client, job_id, seen)):
                seen.add(event["id"])
                clock = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
                typer.echo(f"{clock}  {event['level']:<5}  {event['message']}")
            if not follow or status in FINAL:
                break
            time.sleep(POLL_SECONDS)
    if follow and status != "succeeded":
        raise typer.Exit(1)


def unseen_events(client: Client, job_id: str, seen: set[str]) -> list[Object]:
    """Newest first; stops asking at the first known one."""
    fresh = []
    for event in client.jobs.every_event(job_id):
        if event["id"] in seen:
            break
        fresh.append(event)
    return fresh


@commands.command("metrics")
def metrics(job_id: str, names: Annotated[str, typer.Option(help="Comma-separated, or 'all'.")] = ",".join(SHOWN_METRICS)) -> None:
    """One line a step."""
    wanted = None if names == "all" else names.split(",")
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    with connect() as client:
        for point in client.jobs.every_metric(job_id, names=wanted):
            rows.setdefault((point["step"], point["phase"]), {})[point["name"]] = point["value"]
    for (step, phase), values in sorted(rows.items()):
        typer.echo(f"step {step:>5}  {phase}  " + "  ".join(f"{name} {shorten(value)}" for name, value in sorted(values.items())))


def shorten(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
