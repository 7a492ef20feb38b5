"""The import table of docs/architecture.md, held by reading the code: who may import whom, and who may touch which heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "celery", "fastapi", "sqlalchemy", "redis"}

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "outbound": {"core"},
    "database": {"core", "sqlalchemy"},
    "graders": {"core", "outbound"},
    "trainer": {"core", "graders", "outbound", "torch", "transformers", "peft"},
    "api": {"core", "database", "graders", "outbound", "fastapi", "sqlalchemy"},
    "worker": {"core", "database", "celery", "sqlalchemy"},
    "housekeeping": {"core", "database", "graders", "outbound", "celery", "sqlalchemy"},
    "client": {"core"},
    "local": {"core", "outbound", "client"},
    "migrations": {"core", "database", "sqlalchemy"},
}
"""Rooms and heavy libraries that a room may import; small libraries are free. `local` uses `client` to talk to the API."""

EXCEPTIONS = {
    ("core/doorbell.py", "celery"),
    ("graders/shared_limits.py", "redis"),
    ("graders/reward_model.py", "torch"),
    ("graders/reward_model.py", "transformers"),
    ("local/platform_database.py", "database"),
}
CLIENT_MAY = {"core.specs", "core.grader_specs", "core.options", "core.errors", "core"}


def modules(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py"))


def imported_names(tree: ast.AST) -> list[str]:
    """Every module named by an import statement anywhere in the file, `TYPE_CHECKING` blocks included."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that the table can be read off them"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_room_imports_only_what_the_table_allows(room: str) -> None:
    wrong = []
    for path in modules(room):
        relative = str(path.relative_to(ROOT))
        for name in imported_names(ast.parse(path.read_text())):
            top = name.split(".")[0]
            if top == room or top not in MAY_IMPORT.keys() | HEAVY:
                continue
            if top not in MAY_IMPORT[room] and (relative, top) not in EXCEPTIONS:
                wrong.append(f"{relative} imports {name}")
    assert wrong == []


def test_client_knows_nothing_of_the_house_but_its_words() -> None:
    names = [name for path in modules("client") for name in imported_names(ast.parse(path.read_text()))]
    assert {name for name in names if name.split(".")[0] == "core"} <= CLIENT_MAY


def test_there_is_no_import_circle_between_files() -> None:
    files = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for room in MAY_IMPORT for path in modules(room)}
    graph = {name: {other for other in imported_names(ast.parse(path.read_text())) if other in files} for name, path in files.items()}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in finished:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        finished.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "module", ["api.app", "client.client", "worker.celery_app", "housekeeping.celery_app", "core.specs", "local.cli", "trainer.doctor"]
)
def test_module_imports_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 0, process.stderr or f"{module} pulls in torch"
