"""Expressions over the columns of a table: `n_params < 1e8 and status == 'done'`.

One grammar for the rows to use (`--where`), the settings to hold out (`--holdout`) and computed
columns (`--map`). The text is parsed into a tree, and the tree is computed over whole columns
(expression_tree.py); it never runs as Python. A comparison with a missing value is false.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from scaletune.errors import UserError
from scaletune.records.expression_tree import ExpressionTree, close_name

if TYPE_CHECKING:
    import pandas as pd

LONGEST, DEEPEST = 1000, 64  # characters of a text, levels of its tree
QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|`([^`]+)`|#""")


def select(table: pd.DataFrame, text: str, purpose: str = "a selection") -> pd.Series:
    """Which rows satisfy a condition.

    Args:
        table: One row per run.
        text: A condition over its columns, such as "1e6 < n_params <= 1e8 and optimizer == 'lion'".
        purpose: What the condition is for, as the subject of messages.

    Returns:
        True or False per row, with the index of the table.

    Raises:
        UserError: The text breaks the grammar, is no condition, or names an unknown column.

    Example:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"n_params": [1e6, 1e8], "tokens": [2e7, 2e9]})
        >>> select(runs, "6 * n_params * tokens > 1e17").tolist()
        [False, True]
    """
    import pandas as pd

    tree = _parse(table, text, purpose)
    with np.errstate(all="ignore"):
        rows = tree.condition(tree.body)
    return pd.Series(np.broadcast_to(rows, len(table)).astype(bool), index=table.index)


def compute(table: pd.DataFrame, text: str, purpose: str = "a computed column") -> pd.Series:
    """Computes a number per row, such as "1e6 * size_millions" or "log(perplexity)".

    Args and errors: see `select`. A result that is not finite stays so.
    """
    import pandas as pd

    tree = _parse(table, text, purpose)
    with np.errstate(all="ignore"):
        rows = tree.number(tree.body)
    return pd.Series(np.broadcast_to(rows, len(table)).astype(float), index=table.index)


def map_column(table: pd.DataFrame, text: str, name: str = "NAME") -> pd.Series:
    """The column that `--map NAME=TEXT` takes: one of exactly that name, or a computed one.

    Args:
        table: One row per run.
        text: A column, of any type, or an expression over columns that gives a number.
        name: The new name of the column, for messages.

    Raises:
        UserError: See `select`.
    """
    columns = {str(column): column for column in table.columns}
    if text in columns:
        return table[columns[text]]
    purpose = f"`{name}={' '.join(text.split())}`"
    tree = _parse(table, text, purpose)
    if isinstance(tree.body, ast.Name | ast.Attribute):
        return table[columns[tree.column(tree.body)]]
    return compute(table, text, purpose)


def _parse(table: pd.DataFrame, text: str, purpose: str) -> ExpressionTree:
    """Parses a text; names in backticks become identifiers that the text does not contain."""
    if len(text) > LONGEST:
        raise UserError(f"{purpose} must have at most {LONGEST} characters, but got {len(text)}")
    prefix, names = "column", list[str]()
    while prefix in text:
        prefix += "_"

    def replace_quoted(match: re.Match[str]) -> str:
        if match[0] == "#":
            raise UserError(f"{purpose} must have no #, but got {text!r}: put names in backticks")
        if match[1]:
            return match[1]
        names.append(match[2])
        return f" {prefix}{len(names) - 1} "

    code = QUOTED.sub(replace_quoted, " ".join(text.strip().splitlines())).strip()
    quoted = {f"{prefix}{i}": name for i, name in enumerate(names)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UserError(_not_parsed(table, text, purpose, code)) from None
    if _depth(body) > DEEPEST:
        raise UserError(
            f"{purpose} must have at most {DEEPEST} nested or chained parts, but got"
            f" {text[:60]!r}..."
        )
    return ExpressionTree(table, text, purpose, code, body, quoted)


def _not_parsed(table: pd.DataFrame, text: str, purpose: str, code: str) -> str:
    close = close_name(text, table.columns, 0.75)
    hint = f" (nearest column: {close!r})" if close else ""
    if re.search(r"[^<>=!]=(?!=)", code):
        hint = "; equality is =="
    return (
        f"{purpose} must be an expression over columns, but"
        f" {text!r} cannot be parsed{hint}; a column name with other characters than letters,"
        " digits, _ and . goes in backticks, text in quotes"
    )


def _depth(tree: ast.AST) -> int:
    depth, level = 0, [tree]
    while level:
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        depth += 1
    return depth
