"""Which machine and which code a figure is of."""

import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def describe_machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU ({torch.backends.cpu.get_cpu_capability()})"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {device}, {platform.system()} {platform.machine()}, {versions}"


def describe_commit() -> str:
    """The commit that is checked out, with `-dirty` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
