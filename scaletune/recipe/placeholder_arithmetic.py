"""Arithmetic in placeholders: `{lr / 10}`, `{model.width // 64}`, `{max(1, steps // 10)}`.

Numbers, settings, + - * / // % **, parentheses, min() and max(). The text is parsed into a tree and
computed by it; it never runs as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

LARGEST_EXPONENT, LARGEST_BASE = 64, 1e12  # larger powers take long to compute


def _power(base: Any, exponent: Any) -> Any:
    """A power; ValueError where it takes long to compute, or is no real number."""
    too_large = abs(exponent) > LARGEST_EXPONENT or abs(base) > LARGEST_BASE
    if too_large or (base < 0 and exponent % 1):
        raise ValueError(f"has the power {base}**{exponent}, which is not computed")
    return base**exponent


OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}
GRAMMAR = "settings, numbers, + - * / // % **, parentheses, min() and max()"


def names_in(text: str) -> list[str]:
    """The names of an expression, in their order.

    Raises:
        ValueError: The text is no expression, or has more than the grammar.
    """
    return list(_names(_parse(text)))


def compute_expression(text: str, values: Mapping[str, Any]) -> Any:
    """The value of an expression.

    Raises:
        ValueError: It cannot be computed: it breaks the grammar, or a value is no number.
        KeyError: A name has no value.
    """
    tree = _parse(text)
    list(_names(tree))  # refuses what the grammar does not have
    try:
        return _compute(tree, values)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"cannot be computed: {error}") from None


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"must consist of {GRAMMAR}") from None


def _dotted(node: ast.expr) -> str | None:
    """The dotted name that a node is; None for another node."""
    if isinstance(node, ast.Name):
        return node.id
    base = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{base}.{node.attr}" if base and isinstance(node, ast.Attribute) else None


def _names(node: ast.expr) -> Iterator[str]:
    """The names in a node; ValueError if the grammar does not have it."""
    if (name := _dotted(node)) is not None:
        yield name
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield from _names(node.left)
        yield from _names(node.right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        yield from _names(node.operand)
    elif _is_function(node):
        for each in node.args:
            yield from _names(each)
    elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        raise ValueError(f"must consist of {GRAMMAR}")


def _is_function(node: ast.expr) -> TypeGuard[ast.Call]:
    """Whether a node is min(...) or max(...)."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    return node.func.id in FUNCTIONS and bool(node.args) and not node.keywords


def _compute(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of a node that `_names` accepts."""
    if (name := _dotted(node)) is not None:
        return _number(name, values[name])
    if isinstance(node, ast.BinOp):
        first, second = _compute(node.left, values), _compute(node.right, values)
        return OPERATORS[type(node.op)](first, second)
    if isinstance(node, ast.UnaryOp):
        return SIGNS[type(node.op)](_compute(node.operand, values))
    if isinstance(node, ast.Call):
        arguments = [_compute(each, values) for each in node.args]
        return FUNCTIONS[ast.unparse(node.func)](*arguments)
    assert isinstance(node, ast.Constant)
    return node.value


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must compute with numbers, but {name} is {value!r}")
    return value
