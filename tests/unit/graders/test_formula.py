"""The arithmetic of `calculate_output`, compared with Python's own on generated formulas."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.graders.formula import MAX_CHARS, MAX_DEPTH, FormulaError, parse_formula

NAMES = {"a": 0.25, "b": -3.0, "long_name2": 1e-3}


def strict(function: Callable[..., float]) -> Callable[..., float]:
    """Python's function, for finite floats only: ours does not let min or max hide an infinity."""

    def call(*values: float) -> float:
        if not all(math.isfinite(value) for value in values):
            raise ValueError("not finite")
        return float(function(*values))

    return call


PYTHON = {
    "min": strict(lambda *values: min(values)),
    "max": strict(lambda *values: max(values)),
    "abs": strict(abs),
    "floor": strict(math.floor),
    "ceil": strict(math.ceil),
    "exp": strict(math.exp),
    "sqrt": strict(math.sqrt),
    "log": strict(math.log),
    "power": math.pow,
    "__builtins__": {},
}


class Floats(ast.NodeTransformer):
    """Integers become floats and `**` becomes `power`, which is never complex."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Constant(float(node.value))  # type: ignore[arg-type]

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Pow):
            return ast.Call(ast.Name("power", ast.Load()), [node.left, node.right], [])
        return node


numbers = st.one_of(
    st.sampled_from(["0", "1", "2", "0.5", ".5", "3.", "1e-9", "2.5E+1"]),
    st.floats(0, 1e6, allow_nan=False).map(lambda value: f"{value!r}"),
)
atoms = st.one_of(numbers, st.sampled_from(sorted(NAMES)))


def _wider(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", " - ", "^"]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        st.tuples(st.sampled_from(["abs", "floor", "ceil", "exp", "sqrt", "log"]), inner).map(
            lambda pair: f"{pair[0]}({pair[1]})"
        ),
        st.tuples(st.sampled_from(["min", "max"]), st.lists(inner, min_size=1, max_size=3)).map(
            lambda pair: f"{pair[0]}({', '.join(pair[1])})"
        ),
    )


formulas = st.recursive(atoms, _wider, max_leaves=12)


def python_value(text: str) -> float | None:
    """What Python makes of it in floats; None for no finite value."""
    tree = ast.fix_missing_locations(Floats().visit(ast.parse(text.replace("^", "**"), mode="eval")))
    try:
        value = eval(compile(tree, "formula", "eval"), PYTHON, dict(NAMES))
    except (ArithmeticError, ValueError):
        return None
    return float(value) if math.isfinite(value) else None


def our_value(text: str) -> float | None:
    try:
        return parse_formula(text, NAMES)(NAMES)
    except FormulaError:
        return None


@settings(max_examples=500)
@given(formulas)
def test_the_value_is_pythons(text: str) -> None:
    assert our_value(text) == python_value(text)


@given(st.text(alphabet="ab01.+-*/^(), e", max_size=30))
def test_any_text_is_a_number_or_a_formula_error(text: str) -> None:
    try:
        value = parse_formula(text, NAMES)(NAMES)
    except FormulaError:
        return
    assert math.isfinite(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 ^ 3 ^ 2", 512),
        ("-2^2", -4),
        ("2^-1", 0.5),
        ("--2", 2),
        ("8/4/2", 1),
        ("7 - 2 - 1", 4),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("max(a, b, 0.5)", 0.5),
        ("min(1)", 1),
        ("0.8 * a + 0.2 * max(b, 1e-9)", 0.2 + 0.2e-9),
        ("log(exp(2))", 2),
        ("floor(-0.5) + ceil(0.5)", 0),
        ("sqrt(abs(b * 3))", 3),
    ],
)
def test_precedence_and_functions(text: str, value: float) -> None:
    assert parse_formula(text, NAMES)(NAMES) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["1/0", "0^-1", "(-8)^0.5", "log(0)", "sqrt(b)", "exp(1000)", "10^400", "1e999", "1e308*10"]
)
def test_no_finite_real_value_is_an_error(text: str) -> None:
    formula = parse_formula(text, NAMES)
    with pytest.raises(FormulaError):
        formula(NAMES)


@pytest.mark.parametrize("text", ["min(1e999, 1)", "max(-1e999, 1)", "a * 0"])
def test_a_part_that_is_not_finite_is_not_hidden(text: str) -> None:
    with pytest.raises(FormulaError):
        parse_formula(text, NAMES)({"a": math.nan})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "too early"),
        ("1 +", "too early"),
        ("(1", r"expected '\)'"),
        ("1 2", "unexpected '2' at character 3"),
        ("c + 1", "unknown name 'c'.*a, b, long_name2"),
        ("pow(2, 2)", "unknown function 'pow'"),
        ("abs(1, 2)", "abs takes 1"),
        ("a ** 2", "unexpected '\\*'"),
        ("a if b else 1", "unexpected 'if'"),
        ("__import__('os')", 'unexpected "\'"'),
        ("a.real", "unexpected '.'"),
        ("1; 2", "unexpected ';'"),
        ("(" * (MAX_DEPTH + 1), "nested deeper"),
        ("-" * 5000, "longer"),
        ("-" * (MAX_CHARS - 1) + "1", "nested deeper"),
        ("^".join(["2"] * 1000), "nested deeper"),
    ],
)
def test_a_faulty_formula_is_refused_when_it_is_read(text: str, said: str) -> None:
    with pytest.raises(FormulaError, match=said):
        parse_formula(text, NAMES)


def test_a_long_flat_formula_is_fine() -> None:
    assert parse_formula("+".join(["a"] * 2000), NAMES)(NAMES) == pytest.approx(500)


def test_a_formula_knows_its_variables() -> None:
    assert parse_formula("b + a * b", NAMES).variables == ("b", "a")
