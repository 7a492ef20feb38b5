"""`hone graders` (also `hone grader`) and `hone files`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from core.errors import InvalidRequest
from core.grader_specs import EndpointOptions
from local.connection import connect
from local.grader_probe import probe, read_rows, show
from local.grader_server import GraderServer, load_grade

graders = typer.Typer(help="HTTP graders: register them, write them, try them.", no_args_is_help=True)
files = typer.Typer(help="Data files.", no_args_is_help=True)
SECRET_VARIABLE = "GRADER_SECRET"
HEADER_VARIABLE = "GRADER_HEADER_"
ExistingFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False)]


@graders.command("add")
def add(
    name: str,
    url: str,
    header: Annotated[list[str] | None, typer.Option(help="'Name: value', sent with every request; stored encrypted.")] = None,
    timeout_seconds: float = 60.0,
    max_concurrency: int = 16,
) -> None:
    """Registers an endpoint; prints its id and, this once, its signing secret."""
    options = check_options(url=url, timeout_seconds=timeout_seconds, max_concurrency=max_concurrency)
    with connect() as client:
        grader = client.graders.create(name, options, parse_headers(header or []))
    typer.echo(f"{grader['id']}\nsigning secret (shown only now): {grader['signing_secret']}")


def check_options(**options: Any) -> EndpointOptions:
    """Raises: InvalidRequest naming the first that is wrong."""
    try:
        return EndpointOptions(**options)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise InvalidRequest(f"'{'.'.join(map(str, first['loc']))}': {first['msg']}.") from error


def parse_headers(lines: list[str]) -> dict[str, str]:
    """Raises: InvalidRequest, without repeating what may be a secret."""
    if not all(":" in line for line in lines):
        raise InvalidRequest("A header must look like 'Name: value'.")
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


@graders.command("list")
def list_graders() -> None:
    """The project's graders, newest first."""
    with connect() as client:
        for grader in client.graders.list(limit=100)["data"]:
            typer.echo(f"{grader['id']}@{grader['version']}  {grader['name']}  {grader['url']}")


@graders.command("serve")
def serve(
    file: ExistingFile,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 9000,
) -> None:
    """Serves the function grade(sample, item) of FILE until Ctrl-C.

    Only calls signed with the grader's secret are answered; it is read from GRADER_SECRET, or asked for.
    """
    secret = read_secret(SECRET_VARIABLE, "Signing secret (whsec_...)")
    server = GraderServer(host, port, load_grade(file), secret)
    typer.echo(f"grading on http://{host}:{server.server_port}/ with {file}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


@graders.command("test")
def probe_url(
    url: str,
    secret: Annotated[bool, typer.Option("--secret", help=f"Ask for the signing secret where {SECRET_VARIABLE} is not set.")] = False,
    header: Annotated[
        list[str] | None, typer.Option(help=f"Name of a header to send; its value is read from {HEADER_VARIABLE}NAME, or asked for.")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Rows of your own, as in a training file.", exists=True, dir_okay=False)] = None,
    format: Annotated[str, typer.Option(help="Wire format.")] = "single",
    reward_range: Annotated[tuple[float, float] | None, typer.Option(help="Lowest and highest score.")] = None,
    timeout_seconds: float = 60.0,
    max_concurrency: int = 16,
) -> None:
    """Probes the grader at URL as the platform would use it. Exit code 1 when a probe fails or could not be made."""
    fields = {"url": url, "format": format, "timeout_seconds": timeout_seconds, "max_concurrency": max_concurrency}
    options = check_options(**fields, reward_range=reward_range)
    wants_secret = secret or bool(os.environ.get(SECRET_VARIABLE))
    signing_secret = read_secret(SECRET_VARIABLE, "Signing secret (whsec_...)") if wants_secret else None
    report = probe(options.model_dump(mode="json"), read_headers(header or []), signing_secret, read_rows(rows) if rows else [])
    show(report, Console())
    raise typer.Exit(0 if report["passed"] else 1)


def read_secret(variable: str, question: str) -> str:
    """From the environment, else typed without an echo; never from the command line, which every user of the machine can read."""
    return os.environ.get(variable) or str(typer.prompt(question, hide_input=True, err=True))


def read_headers(names: list[str]) -> dict[str, str]:
    """{name: value}. Raises: InvalidRequest, without repeating what may be a secret, where more than a name was given."""
    if any(":" in name or " " in name for name in names):
        raise InvalidRequest(f"--header takes a name alone; its value is read from {HEADER_VARIABLE}NAME, or asked for.")
    return {name: read_secret(HEADER_VARIABLE + name.upper().replace("-", "_"), f"Value of {name}") for name in names}


@files.command("upload")
def upload(path: ExistingFile, purpose: str = "fine-tune") -> None:
    """Uploads a file; prints its id."""
    with connect() as client:
        typer.echo(client.files.upload(path, purpose)["id"])
