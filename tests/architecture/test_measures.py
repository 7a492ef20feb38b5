"""The house's measures (docs/architecture.md): functions, files, hidden imports, and one screen for the training loop."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "outbound", "database", "graders", "trainer", "api", "worker", "housekeeping", "client", "local", "migrations")
MAX_FUNCTION, MAX_LOOP, MAX_FILE = 60, 80, 400
BROAD = ("Exception", "BaseException")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parsed() -> list[tuple[str, str, ast.Module]]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if "versions" not in path.parts]
    return [(str(path.relative_to(ROOT)), path.read_text(), ast.parse(path.read_text())) for path in files]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_is_longer_than_the_measure() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}: {length(node)} lines"
        for name, _, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and length(node) > (MAX_LOOP if (name, node.name) == ("trainer/loop.py", "train") else MAX_FUNCTION)
    ]
    assert long == []


def test_no_file_is_longer_than_the_measure() -> None:
    assert [f"{name}: {text.count(chr(10))}" for name, text, _ in parsed() if text.count("\n") > MAX_FILE] == []


def test_no_import_hides_in_a_function() -> None:
    hidden = [
        f"{name}:{node.lineno} {node.name}"
        for name, _, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(node))
    ]
    assert hidden == []


def test_source_is_ascii() -> None:
    assert [name for name, text, _ in parsed() if not text.isascii()] == []


def test_no_broad_except_swallows() -> None:
    silent = []
    for name, _, tree in parsed():
        for node in ast.walk(tree):
            is_broad = isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in BROAD)
            if is_broad and all(isinstance(inner, ast.Pass | ast.Continue | ast.Return) for inner in node.body):
                silent.append(f"{name}:{node.lineno}")
    assert silent == []


def test_only_the_estimators_factory_asks_which_algorithm_it_is() -> None:
    """`options.advantage_estimator` and `algorithm` are compared nowhere in the trainer but in advantages.py."""
    wrong = []
    for name, _, tree in parsed():
        if not name.startswith("trainer/") or name == "trainer/advantages.py":
            continue
        for node in ast.walk(tree):
            is_question = isinstance(node, ast.Compare | ast.Match | ast.Subscript)
            if is_question and any(word in ast.unparse(node) for word in ("advantage_estimator", "algorithm")):
                wrong.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_the_training_function_fits_one_screen() -> None:
    tree = ast.parse((ROOT / "trainer/loop.py").read_text())
    (train,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert length(train) <= 60
