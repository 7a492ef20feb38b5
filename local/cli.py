"""The command `hone`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from client.errors import ClientError
from core.errors import PlatformError
from local import cli_graders, cli_jobs, cli_models, cli_verify
from local.up import up as run_platform

commands = typer.Typer(help="Hone: reinforcement fine-tuning on your own machines.", no_args_is_help=True, add_completion=False)
commands.add_typer(cli_models.commands, name="models")
commands.add_typer(cli_jobs.commands, name="jobs")
commands.add_typer(cli_graders.graders, name="graders")
commands.add_typer(cli_graders.graders, name="grader", hidden=True)
commands.add_typer(cli_graders.files, name="files")
commands.command("verify-run")(cli_verify.verify_run)


@commands.command("up")
def up(
    home: Annotated[Path | None, typer.Option(help="Where everything is kept. Default: HONE_HOME, else ~/.hone.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="Jobs at a time. Default: one per GPU, or 1.")] = None,
) -> None:
    """Runs the whole platform on this machine until Ctrl-C."""
    raise typer.Exit(run_platform(home, host, port, workers))


def app() -> None:
    """The entry point: what users cause is one line, not a traceback."""
    try:
        commands()
    except (ClientError, PlatformError) as error:
        sys.stderr.write(f"hone: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    app()
