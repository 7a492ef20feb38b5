import ast
import math
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graders.formula import FormulaError, FormulaValueError, parse_formula

VALUES = {"a": 0.5, "b": -3.0, "c": 2.0, "zero": 0.0}
PYTHON: dict[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: lambda x, y: x + y,
    ast.Sub: lambda x, y: x - y,
    ast.Mult: lambda x, y: x * y,
    ast.Div: lambda x, y: x / y,
    ast.Pow: lambda x, y: x**y,
}


def evaluated_by_python(text: str) -> float | None:
    """The value of `text` under Python's own grammar, None when a step has no finite real value."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant):
            result: float | complex = float(node.value)  # type: ignore[arg-type]
        elif isinstance(node, ast.Name):
            result = VALUES[node.id]
        elif isinstance(node, ast.UnaryOp):
            result = -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        elif isinstance(node, ast.BinOp):
            result = PYTHON[type(node.op)](value(node.left), value(node.right))
        else:
            assert isinstance(node, ast.Call)
            assert isinstance(node.func, ast.Name)
            arguments = [value(argument) for argument in node.args]
            functions = {**vars(math), "abs": abs, "min": lambda *v: min(v), "max": lambda *v: max(v)}
            result = functions[node.func.id](*arguments)
        if isinstance(result, complex) or not math.isfinite(result):
            raise ArithmeticError
        return float(result)

    try:
        return value(ast.parse(text.replace("^", "**"), mode="eval").body)
    except (ArithmeticError, ValueError):
        return None


def expressions() -> st.SearchStrategy[str]:
    atoms = st.sampled_from([*VALUES, "0", "1", "2", "0.5", ".25", "3.", "1e-2", "7E+1"])
    space = st.sampled_from(["", " ", "  "])

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        operator = st.sampled_from("+-*/^")
        return st.one_of(
            st.tuples(inner, space, operator, space, inner).map("".join),
            inner.map(lambda text: f"({text})"),
            inner.map(lambda text: f"-{text}"),
            inner.map(lambda text: f"+ {text}"),
            st.tuples(st.sampled_from(["abs", "floor", "ceil", "exp", "sqrt", "log"]), inner).map(lambda pair: f"{pair[0]}({pair[1]})"),
            st.tuples(st.sampled_from(["min", "max"]), st.lists(inner, min_size=1, max_size=3)).map(lambda p: f"{p[0]}({', '.join(p[1])})"),
        )

    return st.recursive(atoms, extend, max_leaves=12)


@settings(max_examples=500, deadline=None)
@given(expressions())
def test_formula_means_what_the_same_text_means_in_python(text: str) -> None:
    expected = evaluated_by_python(text)
    formula = parse_formula(text, list(VALUES))
    if expected is None:
        with pytest.raises(FormulaValueError):
            formula.evaluate(VALUES)
    else:
        assert formula.evaluate(VALUES) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.8 * a + 0.2 * c", 0.8),
        ("-c ^ 2", -4.0),
        ("2 ^ 3 ^ 2", 512.0),
        ("2 ^ -1", 0.5),
        ("1 - 2 - 3", -4.0),
        ("8 / 4 / 2", 1.0),
        ("min(a, b, c)", -3.0),
        ("max(a, 0.25)", 0.5),
        ("floor(a) + ceil(a)", 1.0),
        ("sqrt(exp(log(4)))", 2.0),
        ("abs(b)", 3.0),
    ],
)
def test_known_values(text: str, value: float) -> None:
    assert parse_formula(text, list(VALUES)).evaluate(VALUES) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["1 / zero", "sqrt(b)", "log(zero)", "exp(1000)", "10 ^ 400", "b ^ 0.5", "zero ^ -1", "1e308 * 10", "c/(1e308*10)"]
)
def test_what_is_no_finite_number_is_an_error_not_a_number(text: str) -> None:
    with pytest.raises(FormulaValueError):
        parse_formula(text, list(VALUES)).evaluate(VALUES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a number"),
        ("a +", "found the end"),
        ("(a + b", r"expected '\)'"),
        ("a b", "expected an operator at position 3"),
        ("a ** b", r"found '\*'"),
        ("d + a", "no grader 'd'"),
        ("pow(a, b)", "no function 'pow'"),
        ("sqrt(a, b)", "takes 1"),
        ("min()", "expected a number"),
        ("a; b", "unexpected ';'"),
        ("a.__class__", "unexpected '.'"),
        ("__import__('os')", "unexpected"),
        ("a if b else c", "expected an operator"),
        ("1e999", "too large"),
        ("a\u00b2", "unexpected"),
        ("\uff11 + a", "unexpected"),
    ],
)
def test_bad_formula_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message) as caught:
        parse_formula(text, list(VALUES), param="grader.calculate_output")
    assert caught.value.code == "formula_parse_error"
    assert caught.value.param == "grader.calculate_output"


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet="0123456789.eE+-*/^(), abcminx", max_size=60)))
def test_any_text_is_a_formula_or_a_formula_error(text: str) -> None:
    try:
        formula = parse_formula(text, list(VALUES))
    except FormulaError:
        return
    assert formula.names <= VALUES.keys()
    assert re.search(r"[0-9a-z]", text)


@pytest.mark.parametrize(
    "text", ["(" * 2000 + "a" + ")" * 2000, "-" * 4000 + "a", "^".join(["c"] * 2000), "abs(" * 1000 + "a" + ")" * 1000]
)
def test_deep_nesting_is_refused_not_a_crash(text: str) -> None:
    with pytest.raises(FormulaError, match="deep"):
        parse_formula(text, list(VALUES))


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9",
        "c^1024",
        "(((c^10)^10)^10)^10",
        "exp(exp(exp(10)))",
        "1e308 * 1e308",
        "0 ^ (0 - 1)",
        "max(" + ", ".join(["c^9999"] * 60) + ")",
        "1 / (a - 0.5)",
    ],
)
def test_towers_of_exponents_end_at_once_without_a_number(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(FormulaValueError):
        parse_formula(text, list(VALUES)).evaluate(VALUES)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "__builtins__",
        "a.real",
        "a[0]",
        "eval(a)",
        "exec('x')",
        "lambda: a",
        "(lambda: a)()",
        "[a for a in b]",
        "a := b",
        "a == b",
        "a and b",
        "'a'",
        "f'{a}'",
        "a // b",
        "a % b",
        "a @ b",
        "~a",
        "a << b",
        "0x10",
        "1_000",
        "1j",
        "a #",
        "a\\\nb",
        "min(*a)",
        "min(a, key=b)",
        "abs",
        "\x00a",
    ],
)
def test_what_only_python_would_understand_is_refused(text: str) -> None:
    with pytest.raises(FormulaError):
        parse_formula(text, list(VALUES))


def test_a_grader_may_have_a_name_that_python_knows() -> None:
    names = {"eval": 1.0, "__class__": 2.0, "lambda": 3.0, "min": 4.0}
    assert parse_formula("eval + __class__ + lambda + min", list(names)).evaluate(names) == 10.0


def test_a_long_flat_formula_is_no_problem() -> None:
    started = time.monotonic()
    assert parse_formula("+".join(["a"] * 2000), ["a"]).evaluate({"a": 1.0}) == 2000.0
    assert time.monotonic() - started < 1.0
