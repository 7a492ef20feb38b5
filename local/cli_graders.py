"""`hone graders` and `hone files`."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from core.errors import InvalidRequest
from core.grader_specs import EndpointOptions
from local.connection import connect

graders = typer.Typer(help="HTTP graders.", no_args_is_help=True)
files = typer.Typer(help="Data files.", no_args_is_help=True)


@graders.command("add")
def add(
    name: str,
    url: str,
    header: Annotated[list[str] | None, typer.Option(help="'Name: value', sent with every request; stored encrypted.")] = None,
    timeout_seconds: float = 60.0,
    max_concurrency: int = 16,
) -> None:
    """Registers an endpoint; prints its id and, this once, its signing secret."""
    try:
        options = EndpointOptions(url=url, timeout_seconds=timeout_seconds, max_concurrency=max_concurrency)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise InvalidRequest(f"'{'.'.join(map(str, first['loc']))}': {first['msg']}.") from error
    with connect() as client:
        grader = client.graders.create(name, options, parse_headers(header or []))
    typer.echo(f"{grader['id']}\nsigning secret (shown only now): {grader['signing_secret']}")


def parse_headers(lines: list[str]) -> dict[str, str]:
    """Raises: InvalidRequest, without repeating what may be a secret."""
    if not all(":" in line for line in lines):
        raise InvalidRequest("A header must look like 'Name: value'.")
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


@graders.command("list")
def list_graders() -> None:
    with connect() as client:
        for grader in client.graders.list(limit=100)["data"]:
            typer.echo(f"{grader['id']}@{grader['version']}  {grader['name']}  {grader['url']}")


@files.command("upload")
def upload(path: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], purpose: str = "fine-tune") -> None:
    """Uploads a file; prints its id."""
    with connect() as client:
        typer.echo(client.files.upload(path, purpose)["id"])
