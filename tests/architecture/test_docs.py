"""The documents name everything that a user can meet: options, settings, error codes."""

import ast
import runpy
from pathlib import Path

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


def test_generated_pages_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs/generate.py"))["pages"]()
    assert len(pages) == 2
    for path, text in pages.items():
        assert path.read_text() == text, f"run: python docs/generate.py ({path.name})"
