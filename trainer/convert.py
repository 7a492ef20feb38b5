"""Makes a plain Hugging Face folder (safetensors, tokenizer, chat template) of a GGUF file, a hub id at a commit or another folder.

`python -m trainer.convert SOURCE DESTINATION`, SOURCE being JSON as a model's `source` is stored, or a path.
Never runs code that comes with a model. Hub calls have huggingface_hub's own timeouts (10 seconds without an answer).
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from core.errors import InvalidRequest, PlatformError, boundary
from core.run_directory import fsync_folder


def convert(source: dict[str, Any], destination: Path) -> Path:
    """`destination`, written aside and renamed; one that is there already is whole and stays.

    Raises: InvalidRequest where the source cannot be read as a causal language model with a tokenizer.
    """
    if destination.exists():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        with boundary(InvalidRequest, f"cannot convert {source.get('path') or source.get('repo')}"):
            model, tokenizer = _load(source)
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        _publish(aside, destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return destination


def parse_source(text: str) -> dict[str, Any]:
    """JSON as stored with a model, or the path of a GGUF file or folder. Raises: InvalidRequest."""
    if text.lstrip().startswith("{"):
        with boundary(InvalidRequest, "SOURCE"):
            source: dict[str, Any] = json.loads(text)
        return source
    return {"type": "folder" if Path(text).is_dir() else "gguf", "path": text}


def _load(source: dict[str, Any]) -> tuple[Any, Any]:
    match source.get("type"):
        case "gguf":
            return _load_gguf(Path(source["path"]))
        case "hub":
            return _load_plain(source["repo"], revision=source["revision"])
        case "folder":
            return _load_plain(source["path"], local_files_only=True)
    raise InvalidRequest(f"source type {source.get('type')!r}: it must be gguf, hub or folder.")


def _load_plain(name: str, **where: Any) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True, trust_remote_code=False, **where)
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)


def _load_gguf(path: Path) -> tuple[Any, Any]:
    """Dequantised to float32. The library will not save what it loaded from GGUF, so the same weights go into a model made anew."""
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    values = {name: value for name, value in loaded.config.to_dict().items() if name not in ("quantization_config", "_name_or_path")}
    config = type(loaded.config)(**values)
    config.architectures = [type(loaded).__name__]
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain, AutoTokenizer.from_pretrained(path.parent, **where)


def _publish(aside: Path, destination: Path) -> None:
    os.chmod(aside, 0o755)
    for path in aside.rglob("*"):
        if path.is_file():
            os.chmod(path, 0o644)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    fsync_folder(aside)
    try:
        os.rename(aside, destination)
    except OSError:
        if not destination.exists():
            raise
        return  # Another process was faster: its folder is as whole as ours.
    fsync_folder(destination.parent)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m trainer.convert SOURCE DESTINATION", file=sys.stderr)
        return 2
    transformers_logging.disable_progress_bar()
    try:
        print(convert(parse_source(arguments[0]), Path(arguments[1])))
    except PlatformError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
