"""`calculate_output` of a multi grader: a small arithmetic language over the names of its parts (contract §5.7).

Does not cover: where the numbers come from (`multi`). Never `eval`: `^` is power here, and only floats exist.

    sum     = product (("+" | "-") product)*
    product = unary (("*" | "/") unary)*
    unary   = ("-" | "+") unary | power
    power   = atom ("^" unary)?              right-associative and tighter than a minus on its left: -2^2 is -4
    atom    = number | name | name "(" sum ("," sum)* ")" | "(" sum ")"
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

MAX_CHARS = 4096
MAX_DEPTH = 64

Evaluator = Callable[[Mapping[str, float]], float]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<op>[-+*/^(),]))", re.ASCII
)
_MANY = 1_000_000
# name → (function, fewest arguments, most arguments)
FUNCTIONS: Mapping[str, tuple[Callable[..., float], int, int]] = {
    "min": (lambda *values: min(values), 1, _MANY),
    "max": (lambda *values: max(values), 1, _MANY),
    "abs": (abs, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "exp": (math.exp, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
}


class FormulaError(ValueError):
    """The formula cannot be read, or has no finite value for these numbers."""


@dataclass(frozen=True)
class Formula:
    """A parsed formula. `variables` are the names that it uses, in order of first use."""

    text: str
    variables: tuple[str, ...]
    _evaluate: Evaluator

    def __call__(self, values: Mapping[str, float]) -> float:
        """The value for these numbers. Raises FormulaError on division by zero, overflow, or anything not finite."""
        try:
            result = self._evaluate(values)
        except FormulaError:
            raise
        except (ArithmeticError, ValueError) as error:
            raise FormulaError(f"{self.text!r} has no value here: {error}") from None
        if not math.isfinite(result):
            raise FormulaError(f"{self.text!r} has no finite value here: {result}")
        return result


def parse_formula(text: str, names: Collection[str]) -> Formula:
    """Read a formula over `names`. Raises FormulaError with the position of the fault or the unknown name."""
    if len(text) > MAX_CHARS:
        raise FormulaError(f"the formula is longer than {MAX_CHARS} characters")
    reader = _Reader(text, frozenset(names))
    evaluate = reader.sum(0)
    if reader.peek() is not None:
        raise reader.fault(f"unexpected {reader.peek()!r}")
    return Formula(text, tuple(reader.used), evaluate)


class _Reader:
    """Recursive descent over the tokens; each method returns a closure that computes its part."""

    def __init__(self, text: str, names: frozenset[str]) -> None:
        self._names = names
        self._tokens: list[tuple[str, str, int]] = []  # kind, text, position
        self._at = 0
        self.used: dict[str, None] = {}
        position, end = 0, len(text.rstrip())
        self._end = end
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                bad = position + len(text[position:]) - len(text[position:].lstrip())
                raise FormulaError(f"unexpected {text[bad]!r} at character {bad + 1}")
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()

    def peek(self) -> str | None:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else None

    def fault(self, what: str) -> FormulaError:
        position = self._tokens[self._at][2] if self._at < len(self._tokens) else self._end
        return FormulaError(f"{what} at character {position + 1}")

    def _next(self) -> tuple[str, str]:
        if self._at >= len(self._tokens):
            raise self.fault("the formula ends too early")
        kind, text, _ = self._tokens[self._at]
        self._at += 1
        return kind, text

    def _expect(self, text: str) -> None:
        if self.peek() != text:
            raise self.fault(f"expected {text!r}")
        self._at += 1

    def _deeper(self, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise self.fault(f"the formula is nested deeper than {MAX_DEPTH}")
        return depth + 1

    def sum(self, depth: int) -> Evaluator:
        depth = self._deeper(depth)
        terms = [(1.0, self._product(depth))]
        while self.peek() in ("+", "-"):
            sign = 1.0 if self._next()[1] == "+" else -1.0
            terms.append((sign, self._product(depth)))
        if len(terms) == 1:
            return terms[0][1]
        return lambda values: _fold_sum(terms, values)

    def _product(self, depth: int) -> Evaluator:
        factors = [("*", self._unary(depth))]
        while self.peek() in ("*", "/"):
            factors.append((self._next()[1], self._unary(depth)))
        if len(factors) == 1:
            return factors[0][1]
        return lambda values: _fold_product(factors, values)

    def _unary(self, depth: int) -> Evaluator:
        if self.peek() not in ("-", "+"):
            return self._power(depth)
        sign = self._next()[1]
        operand = self._unary(self._deeper(depth))
        return operand if sign == "+" else lambda values: -operand(values)

    def _power(self, depth: int) -> Evaluator:
        base = self._atom(depth)
        if self.peek() != "^":
            return base
        self._next()
        exponent = self._unary(self._deeper(depth))
        return lambda values: math.pow(base(values), exponent(values))  # never complex, unlike **

    def _atom(self, depth: int) -> Evaluator:
        start = self._at
        kind, text = self._next()
        if kind == "number":
            number = float(text)
            return lambda values: number
        if kind == "name":
            if self.peek() == "(":
                return self._call(text, depth, start)
            if text not in self._names:
                self._at = start
                known = ", ".join(sorted(self._names)) or "none"
                raise self.fault(f"unknown name {text!r} (known: {known})")
            self.used[text] = None
            return lambda values: float(values[text])
        if text == "(":
            inner = self.sum(depth)
            self._expect(")")
            return inner
        self._at = start
        raise self.fault(f"unexpected {text!r}")

    def _call(self, name: str, depth: int, start: int) -> Evaluator:
        if name not in FUNCTIONS:
            self._at = start
            raise self.fault(f"unknown function {name!r} (known: {', '.join(sorted(FUNCTIONS))})")
        function, fewest, most = FUNCTIONS[name]
        self._expect("(")
        arguments = [self.sum(depth)]
        while self.peek() == ",":
            self._next()
            arguments.append(self.sum(depth))
        self._expect(")")
        if not fewest <= len(arguments) <= most:
            self._at = start
            raise self.fault(f"{name} takes {fewest} argument(s), not {len(arguments)},")
        return lambda values: float(function(*(_finite(argument(values)) for argument in arguments)))


def _finite(value: float) -> float:
    # min and max would let an infinity or NaN disappear; floor of one raises anyway.
    if not math.isfinite(value):
        raise FormulaError(f"a part of the formula is not finite: {value}")
    return value


def _fold_sum(terms: list[tuple[float, Evaluator]], values: Mapping[str, float]) -> float:
    total = terms[0][1](values)
    for sign, term in terms[1:]:
        total += sign * term(values)
    return total


def _fold_product(factors: list[tuple[str, Evaluator]], values: Mapping[str, float]) -> float:
    total = factors[0][1](values)
    for operator, factor in factors[1:]:
        total = total * factor(values) if operator == "*" else total / factor(values)
    return total
