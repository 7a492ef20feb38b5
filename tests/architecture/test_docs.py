"""The documents name everything that a user can meet: options, settings, error codes."""

import ast
import re
import runpy
from pathlib import Path

import pytest

from core.options import Options
from core.presets import PRESETS
from trainer.properties import ADVICE

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "outbound", "database", "graders", "trainer", "api", "worker", "housekeeping")


def error_codes() -> set[str]:
    """Every literal `code="..."` of a call, `code = "..."` of an error class, and the lifecycle's refusals."""
    codes: set[str] = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                    codes.add(str(node.value.value))
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code" and isinstance(node.value, ast.Constant):
                    codes.add(str(node.value.value))
    return {code for code in codes if code != "None"}


def test_every_error_code_has_its_line_in_the_docs() -> None:
    documented = (ROOT / "docs/errors.md").read_text()
    assert sorted(code for code in error_codes() if f"`{code}`" not in documented) == []


def test_every_option_is_explained_and_has_its_topic() -> None:
    text, topics = (ROOT / "docs/algorithms.md").read_text().split("## Options by topic")
    assert [name for name in Options.model_fields if not re.search(rf"\b{name}\b", text)] == []
    assert [name for name in Options.model_fields if topics.count(f"`{name}`") != 1] == []


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_described_by_what_it_sets(name: str) -> None:
    lines = (ROOT / "docs/algorithms.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
    settings = row.split("|")[2].strip()
    assert settings == ", ".join(f"`{option}: {value}`" for option, value in PRESETS[name].items()) or not PRESETS[name]


def test_every_property_of_preflight_is_explained() -> None:
    headings = [line.strip("# `") for line in (ROOT / "docs/preflight.md").read_text().splitlines() if line.startswith("### `")]
    assert headings == list(ADVICE)


def test_generated_pages_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs/generate.py"))["pages"]()
    assert len(pages) == 4
    for path, text in pages.items():
        assert path.read_text() == text, f"run: python docs/generate.py ({path.name})"
