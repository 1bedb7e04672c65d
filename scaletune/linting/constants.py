"""Folds constant expressions of Python source: parsed, and never evaluated."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from scaletune.linting.values import OTHER, UNREAD

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "math.sqrt": math.sqrt,
    "math.log": math.log,
    "math.log2": math.log2,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "np.sqrt": math.sqrt,
    "sqrt": math.sqrt,
    "float": float,
    "int": int,
    "round": round,
    "abs": abs,
    "min": min,
    "max": max,
    "list": list,
    "tuple": list,
}
NAMES = {"math.pi": math.pi, "math.e": math.e, "math.inf": math.inf, "None": None}
LONGEST = 100_000
"""Length up to which texts and lists are joined."""
CLASS = "_class"
"""Key for the name of the class or function that a call names."""


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` of a name or of attributes, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted_name(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def compute(kind: type, first: Any, second: Any) -> Any:
    """The result of an arithmetic operator on numbers, or of joining two texts or two lists."""
    numbers = all(isinstance(value, int | float) for value in (first, second))
    joins = kind is ast.Add and type(first) is type(second) and isinstance(first, str | list)
    too_large = numbers and kind is ast.Pow and (abs(second) > 64 or abs(first) > 1e9)
    too_long = joins and len(first) + len(second) > LONGEST
    if kind not in OPERATORS or not (numbers or joins) or too_large or too_long:
        return UNREAD
    try:
        value = OPERATORS[kind](first, second)
    except (ArithmeticError, TypeError, ValueError):
        return UNREAD
    return UNREAD if isinstance(value, complex) else value


def fold(node: ast.AST | None, names: Mapping[str, Any]) -> Any:
    """The constant that an expression stands for, or UNREAD.

    A call of an unknown function becomes a mapping of its keyword arguments, with its name under
    `_class`.
    """
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute():
            return _lookup(node, names)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = fold(operand, names)
            return -value if isinstance(value, int | float) else UNREAD
        case ast.BinOp(op=op):
            return compute(type(op), fold(node.left, names), fold(node.right, names))
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return _fold_items(elements, names)
        case ast.Dict(keys=keys, values=values):
            return _fold_dict(keys, values, names)
        case ast.Call():
            return _fold_call(node, names)
        case ast.Subscript(value=owner, slice=index):
            content, key = fold(owner, names), fold(index, names)
            known = isinstance(content, Mapping) and isinstance(key, str | int)
            return content.get(key, UNREAD) if known else UNREAD
        case ast.Starred(value=value):
            return fold(value, names)
    return UNREAD


def _lookup(node: ast.Name | ast.Attribute, names: Mapping[str, Any]) -> Any:
    name = dotted_name(node)
    if name in names:
        return names[name]
    if name in NAMES:
        return NAMES[name]
    if isinstance(node, ast.Attribute):
        owner = fold(node.value, names)
        if isinstance(owner, Mapping) and node.attr in owner:
            return owner[node.attr]
        if name and name.split(".", 1)[0][:1].isupper():
            return name  # a member of an enumeration, such as DType.bfloat16
    return UNREAD


def _fold_items(elements: list[ast.expr], names: Mapping[str, Any]) -> list[Any]:
    items: list[Any] = []
    for element in elements:
        value = fold(element, names)
        starred = isinstance(element, ast.Starred) and isinstance(value, list)
        items += value if starred else [value]
    return items


def _fold_dict(
    keys: list[ast.expr | None], values: list[ast.expr], names: Mapping[str, Any]
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in zip(keys, values, strict=True):
        folded = fold(value, names)
        if key is None:
            content |= folded if isinstance(folded, Mapping) else {OTHER: UNREAD}
        elif (name := fold(key, names)) is not UNREAD:
            content[str(name)] = folded
    return content


def _fold_call(node: ast.Call, names: Mapping[str, Any]) -> Any:
    name = dotted_name(node.func) or getattr(node.func, "attr", "")
    arguments = _fold_items(node.args, names)
    if name in FUNCTIONS and not node.keywords:
        try:
            return FUNCTIONS[name](*arguments)
        except (ArithmeticError, TypeError, ValueError):
            return UNREAD
    keywords = _fold_dict(
        [ast.Constant(word.arg) if word.arg else None for word in node.keywords],
        [word.value for word in node.keywords],
        names,
    )
    if name == "dict":
        first = [value for value in arguments if isinstance(value, Mapping)]
        return (dict(first[0]) if first else {}) | keywords
    if name == "field":
        return keywords.get("default", UNREAD)
    results = names.get(f"{name}()")
    if isinstance(results, Mapping):
        return dict(results) | ({} if results.get(CLASS) else keywords)
    if not keywords and not arguments:
        return {CLASS: name} if name.rsplit(".", 1)[-1][:1].isupper() else UNREAD
    groups = [value for value in arguments if isinstance(value, list)]
    own: dict[str, Any] = {CLASS: name} | ({"param_groups": groups[0]} if groups else {})
    if len(arguments) == 1 and not keywords and isinstance(arguments[0], int | float):
        own |= {name.rsplit(".", 1)[-1]: arguments[0]}  # Duration.steps(1000)
    return own | keywords if keywords or len(own) > 1 else UNREAD
