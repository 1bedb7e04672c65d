"""Computes the tree of an expression over the columns of a table.

`ExpressionTree` walks the nodes that the grammar allows and refuses every other node. All numbers
are NumPy floats, so huge powers are infinite instead of slow.
"""

from __future__ import annotations

import ast
import difflib
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

GRAMMAR = (
    "columns, numbers, 'text', < <= == != >= >, in ('a', 'b'), and, or, not, + - * / **, log() and"
    " exp()"
)
MOST_LISTED = 30  # column names in a message
MOST_SHOWN = 80  # characters of a text in a message
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {"log": np.log, "exp": np.exp}
CONDITION, TEXT, NUMBER = "a condition", "text", "a number"  # the kinds of a node

Values = NDArray[Any]


def list_columns(names: Iterable[Any]) -> str:
    """`the columns are: ...`, at most MOST_LISTED of them."""
    names = [str(name) for name in names]
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return f"the columns are: {', '.join(names[:MOST_LISTED])}{more}"


def close_name(name: str, names: Iterable[Any], cutoff: float = 0.6) -> str | None:
    """The most similar of `names`, if one is similar enough."""
    close = difflib.get_close_matches(name, [str(each) for each in names], n=1, cutoff=cutoff)
    return close[0] if close else None


@dataclass(frozen=True)
class ExpressionTree:
    """A parsed text and the table that it is computed over.

    `condition`, `number` and `words` compute a node as that kind, or refuse it.
    """

    table: pd.DataFrame
    text: str

    purpose: str
    """The subject of messages."""

    code: str
    """The text that was parsed."""

    body: ast.expr

    quoted: dict[str, str]
    """Identifier in `code` -> the column name that the text has in backticks."""

    def condition(self, node: ast.expr) -> Values:
        """True or False per row."""
        if isinstance(node, ast.BoolOp):
            parts = self._broadcast(map(self.condition, node.values))
            combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return np.asarray(combine.reduce(parts))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            results = [self._compare(node, first, op, second) for first, op, second in pairs]
            return np.asarray(np.logical_and.reduce(self._broadcast(results)))
        if (kind := self._kind(node)) != CONDITION:
            self._fail(f"a condition such as n_params < 1e8, but {self._part(node)} is {kind}")
        if isinstance(node, ast.Constant):
            return np.array(node.value)
        return np.array([bool(value) for value in self._values(node)])

    def number(self, node: ast.expr) -> Values:
        """A float per row; NaN for a missing value."""
        kind = self._kind(node)
        if isinstance(node, ast.Name | ast.Attribute):
            return self._numbers(node)
        if kind != NUMBER:
            self._fail(f"a number where it compares or computes, but {self._part(node)} is {kind}")
        if isinstance(node, ast.BinOp):
            first, second = self.number(node.left), self.number(node.right)
            return np.asarray(ARITHMETIC[type(node.op)](first, second))
        if isinstance(node, ast.UnaryOp):
            value = self.number(node.operand)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.Call):
            return np.asarray(self._function(node)(self.number(node.args[0])))
        assert isinstance(node, ast.Constant)
        try:
            return np.array(float(node.value))  # type: ignore[arg-type]
        except OverflowError:
            return np.array(np.inf)

    def words(self, node: ast.expr) -> Values:
        """Text per row; None for a missing value."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return np.array(node.value, dtype=object)
        kind = self._kind(node)
        is_column = isinstance(node, ast.Name | ast.Attribute)
        if kind == CONDITION or not is_column or self._series(node).dtype.kind in "iuf":
            self._fail(f"text on both sides, but {self._part(node)} is {kind}")
        values = self._values(node)
        return np.array([None if v is None else str(v) for v in values], dtype=object)

    def column(self, node: ast.expr) -> str:
        """The column that a name, or a dotted name, stands for."""
        name = self._dotted(node)
        if name is None:
            self._refuse(node)
        names = [str(column) for column in self.table.columns]
        if name in names:
            return name
        close = close_name(name, names) or close_name(self.text, names, 0.75)
        hint = f" (nearest: {close!r})" if close else f" (text goes in quotes: {name!r})"
        within = [n for n in names if name in n and re.search(rf"{re.escape(n)}(?!\w)", self.text)]
        if within:
            hint = f" (a name with such characters goes in backticks: `{within[0]}`)"
        raise UserError(
            f"{self.purpose} must name a column of the table, but got `{name}`{hint};"
            f" {list_columns(names)}"
        )

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.quoted.get(node.id, node.id)
        base = self._dotted(node.value) if isinstance(node, ast.Attribute) else None
        return f"{base}.{node.attr}" if base and isinstance(node, ast.Attribute) else None

    def _series(self, node: ast.expr) -> pd.Series:
        position = [str(column) for column in self.table.columns].index(self.column(node))
        return self.table.iloc[:, position]

    def _values(self, node: ast.expr) -> list[Any]:
        """The values of a column, None where they are missing."""
        series = self._series(node).astype(object)
        return series.where(series.notna(), None).tolist()

    def _numbers(self, node: ast.expr) -> Values:
        """A column as floats."""
        series = self._series(node)
        if series.dtype.kind in "iufb":
            return np.asarray(series.to_numpy(float, na_value=np.nan))
        values = self._values(node)
        text = [v for v in values if v is not None and not _is_number(v)]
        if text:
            self._fail(
                f"numbers where it compares or computes, but the column {self._part(node)} holds"
                f" text such as {str(text[0])[:40]!r}"
            )
        return np.array([np.nan if value is None else float(value) for value in values])

    def _kind(self, node: ast.expr) -> str:
        """CONDITION, TEXT or NUMBER; refuses a node that is not in the grammar."""
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | str | int | float):
            return {bool: CONDITION, str: TEXT}.get(type(node.value), NUMBER)
        if isinstance(node, ast.BoolOp | ast.Compare):
            return CONDITION
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Invert):
            return CONDITION if isinstance(node.op, ast.Not) else NUMBER
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return NUMBER
        if isinstance(node, ast.Call):
            self._function(node)
            return NUMBER
        if not isinstance(node, ast.Name | ast.Attribute):
            self._refuse(node)
        kind = self._series(node).dtype.kind
        if kind in "biuf":
            return CONDITION if kind == "b" else NUMBER
        known = [value for value in self._values(node) if value is not None]
        if known and all(isinstance(value, bool | np.bool_) for value in known):
            return CONDITION
        return NUMBER if all(map(_is_number, known)) else TEXT

    def _compare(
        self, node: ast.Compare, first: ast.expr, op: ast.cmpop, second: ast.expr
    ) -> Values:
        if isinstance(op, ast.In | ast.NotIn):
            return self._is_in(node, first, op, second)
        if type(op) not in COMPARISONS:
            self._refuse(node)
        kinds = {self._kind(first), self._kind(second)}
        as_kind = self.number
        if kinds == {TEXT} or any(map(_is_text, (first, second))):
            if not isinstance(op, ast.Eq | ast.NotEq):
                self._fail(f"== or != between texts, but got {self._part(node)}")
            as_kind = self.words
        elif kinds == {CONDITION}:
            as_kind = self.condition
        a, b = as_kind(first), as_kind(second)
        return np.asarray(COMPARISONS[type(op)](a, b) & _known(a) & _known(b), dtype=bool)

    def _is_in(self, node: ast.Compare, first: ast.expr, op: ast.cmpop, second: ast.expr) -> Values:
        """`in` is an `or` of equalities, `not in` an `and` of inequalities."""
        values = second.elts if isinstance(second, ast.Tuple | ast.List | ast.Set) else [second]
        plain = [item.operand if isinstance(item, ast.UnaryOp) else item for item in values]
        if not plain or not all(isinstance(item, ast.Constant) for item in plain):
            self._fail(f"values after `in`, such as in ('a', 'b'), but got {self._part(node)}")
        positive = isinstance(op, ast.In)
        each = ast.Eq() if positive else ast.NotEq()
        results = self._broadcast(self._compare(node, first, each, item) for item in values)
        return np.asarray((np.logical_or if positive else np.logical_and).reduce(results))

    def _function(self, node: ast.Call) -> Callable[[Any], Any]:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in FUNCTIONS or len(node.args) != 1 or node.keywords:
            self._refuse(node)
        return FUNCTIONS[name]

    def _broadcast(self, parts: Iterable[Values]) -> list[Values]:
        return [np.broadcast_to(part, len(self.table)) for part in parts]

    def _part(self, node: ast.expr) -> str:
        """The text of a node as it was written."""
        part = ast.get_source_segment(self.code, node) or self.text
        for identifier, name in self.quoted.items():
            part = f"`{name}`".join(re.split(rf"\s?\b{identifier}\b\s?", part))
        return part if len(part) <= MOST_SHOWN else f"{part[:MOST_SHOWN]}..."

    def _refuse(self, node: ast.expr) -> NoReturn:
        raise UserError(f"{self.purpose} must consist of {GRAMMAR}, but got `{self._part(node)}`")

    def _fail(self, rule: str) -> NoReturn:
        within = "" if self.text in rule or self.text in self.purpose else f", in {self.text!r}"
        raise UserError(f"{self.purpose} must have {rule}{within}")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _known(values: Values) -> Any:
    """Whether each value is present."""
    if values.dtype == object:
        return np.array([value is not None for value in values.flat]).reshape(values.shape)
    return ~np.isnan(values) if values.dtype.kind == "f" else True
