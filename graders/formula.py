"""The formulas of `multi` graders: + - * / ^, parentheses, eight functions, names of graders. Never evaluated as code.

Precedence and associativity are Python's, with ^ for **. Whatever is not a finite number is an error.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from core.errors import GraderError, InvalidRequest

MAX_DEPTH = 50

FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (lambda *values: min(values), 1, 64),
    "max": (lambda *values: max(values), 1, 64),
    "abs": (abs, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "exp": (math.exp, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
}
"""name -> (function, fewest arguments, most arguments). `log` is natural."""

OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
    "^": math.pow,
}
_TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<symbol>[-+*/^(),]))", re.ASCII)


class FormulaError(InvalidRequest):
    code = "formula_parse_error"


class FormulaValueError(GraderError):
    """The formula has no finite value for these numbers."""

    code = "formula_value_error"


@dataclass(frozen=True)
class _Call:
    """Takes `num_arguments` numbers from the stack and puts `function` of them there."""

    function: Callable[..., float]
    num_arguments: int
    symbol: str


@dataclass(frozen=True)
class Formula:
    text: str
    names: frozenset[str]
    """The graders that the formula names."""

    _program: tuple[float | str | _Call, ...]
    """In postfix order: a number, the name of a grader, or a call."""

    def evaluate(self, values: Mapping[str, float]) -> float:
        """Raises: FormulaValueError when a step has no finite value."""
        stack: list[float] = []
        for step in self._program:
            if isinstance(step, _Call):
                arguments = stack[len(stack) - step.num_arguments :]
                del stack[len(stack) - step.num_arguments :]
                stack.append(_apply(step, arguments))
            else:
                stack.append(values[step] if isinstance(step, str) else step)
        return stack[0]


def parse_formula(text: str, names: Sequence[str], param: str | None = None) -> Formula:
    """Raises: FormulaError saying what was expected and where, or which name is unknown."""
    try:
        parser = _Parser(_tokens(text))
        parser.expression()
        parser.expect_end()
    except FormulaError as error:
        raise FormulaError(f"'{text}': {error.message}", param=param) from error
    unknown = parser.names - set(names)
    if unknown:
        known = ", ".join(sorted(names))
        raise FormulaError(f"'{text}': there is no grader '{min(unknown)}'; the graders are {known}.", param=param)
    return Formula(text, frozenset(parser.names), tuple(parser.program))


def _apply(call: _Call, arguments: list[float]) -> float:
    try:
        value = float(call.function(*arguments))
    except (ArithmeticError, ValueError) as error:
        raise _not_finite(call, arguments) from error
    if not math.isfinite(value):
        raise _not_finite(call, arguments)
    return value


def _not_finite(call: _Call, arguments: list[float]) -> FormulaValueError:
    shown = ", ".join(f"{argument:g}" for argument in arguments)
    return FormulaValueError(f"'{call.symbol}' of {shown} is not a finite number.")


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """(kind, text, position) of every token, then one of kind `end`."""
    tokens, position = [], 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None or match.lastgroup is None:
            raise FormulaError(f"unexpected '{stripped[position:].lstrip()[0]}' at position {position + 1}.")
        tokens.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1))
        position = match.end()
    return [*tokens, ("end", "the end", len(stripped) + 1)]


class _Parser:
    """Recursive descent that writes a postfix program.

    expression = term {(+|-) term}; term = signed {(*|/) signed}; signed = (+|-) signed | power; power = atom [^ signed].
    """

    def __init__(self, tokens: list[tuple[str, str, int]]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0
        self.names: set[str] = set()
        self.program: list[float | str | _Call] = []

    def expression(self) -> None:
        self._binary(("+", "-"), lambda: self._binary(("*", "/"), self._signed))

    def expect_end(self) -> None:
        if self._peek()[0] != "end":
            raise self._unexpected("an operator")

    def _binary(self, symbols: tuple[str, ...], operand: Callable[[], None]) -> None:
        operand()
        while self._peek()[1] in symbols:
            symbol = self._take()
            operand()
            self.program.append(_Call(OPERATORS[symbol], 2, symbol))

    def _signed(self) -> None:
        """Counts the depth: every way down the grammar comes through here."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise FormulaError(f"nested more than {MAX_DEPTH} deep.")
        if self._peek()[1] in ("+", "-"):
            sign = self._take()
            self._signed()
            if sign == "-":
                self.program.append(_Call(lambda value: -value, 1, "-"))
        else:
            self._power()
        self._depth -= 1

    def _power(self) -> None:
        self._atom()
        if self._peek()[1] == "^":
            self._take()
            self._signed()
            self.program.append(_Call(OPERATORS["^"], 2, "^"))

    def _atom(self) -> None:
        kind, text, _ = self._peek()
        if kind == "number":
            self._number()
        elif kind == "name":
            self._take()
            if self._peek()[1] == "(":
                self._call(text)
            else:
                self.names.add(text)
                self.program.append(text)
        elif text == "(":
            self._take()
            self.expression()
            self._expect(")")
        else:
            raise self._unexpected("a number, a grader or '('")

    def _number(self) -> None:
        text = self._take()
        value = float(text)
        if not math.isfinite(value):
            raise FormulaError(f"the number {text} is too large.")
        self.program.append(value)

    def _call(self, name: str) -> None:
        if name not in FUNCTIONS:
            raise FormulaError(f"there is no function '{name}'; the functions are {', '.join(FUNCTIONS)}.")
        function, fewest, most = FUNCTIONS[name]
        self._expect("(")
        self.expression()
        num_arguments = 1
        while self._peek()[1] == ",":
            self._take()
            self.expression()
            num_arguments += 1
        self._expect(")")
        if not fewest <= num_arguments <= most:
            raise FormulaError(f"'{name}' takes {fewest if fewest == most else f'{fewest} to {most}'} arguments, not {num_arguments}.")
        self.program.append(_Call(function, num_arguments, name))

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._next]

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1][1]

    def _expect(self, symbol: str) -> None:
        if self._peek()[1] != symbol:
            raise self._unexpected(f"'{symbol}'")
        self._take()

    def _unexpected(self, wanted: str) -> FormulaError:
        kind, text, position = self._peek()
        return FormulaError(f"expected {wanted} at position {position}, found {text if kind == 'end' else repr(text)}.")
