"""Probes of a URL from the terminal: the program that makes them is started, told by a pipe, and its report is shown."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.errors import InvalidRequest, PlatformError
from core.rows import parse_row

PROBE_COMMAND = (sys.executable, "-m", "graders.probe_url")
MAX_SECONDS = 360.0
MAX_ROWS = 20
STYLES = {"passed": "green", "warning": "yellow", "failed": "red", "skipped": "red"}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The first rows of a training file, as graders see them. Raises: InvalidRequest naming the line."""
    rows: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(parse_row(line, number, "training_file").item)
            if len(rows) == MAX_ROWS:
                break
    return rows


def probe(options: dict[str, Any], headers: dict[str, str], signing_secret: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The report. Secrets go to the probing program by a pipe alone. Raises: PlatformError when it does not end well."""
    asked = json.dumps({"options": options, "headers": headers, "signing_secret": signing_secret, "rows": rows})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADER_")}
    try:
        process = subprocess.run(
            PROBE_COMMAND, input=asked, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PlatformError(f"The probes did not end within {MAX_SECONDS:g} seconds.") from error
    if process.returncode != 0:
        raise InvalidRequest(f"The probes could not be made: {(process.stderr.strip().splitlines() or ['no reason was given'])[-1]}")
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """A line per probe, and what came of all."""
    table = Table("probe", "outcome", "what was found")
    for finding in report["findings"]:
        style = STYLES[finding["outcome"]]
        table.add_row(finding["probe"], f"[{style}]{finding['outcome']}[/{style}]", _plain(finding["message"]))
    console.print(table)
    console.print(f"{report['summary']}. {report['num_calls']} calls in {report['seconds']:.1f} s.", markup=False)


def _plain(text: str) -> str:
    """A message quotes the grader: nothing in it is markup, and no control character reaches the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text).replace("[", "\\[")
