"""Checks a table of runs and groups its rows into cells.

A cell is one setting: one (n_params, tokens). Sizes or token budgets that differ by less than 1 %
count as equal. Also parses hold-out expressions.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError, nearest
from scaletune.records import COLUMNS

# Values closer than this factor are one scale: steps * batch_tokens rounds differently in each run.
SAME_SCALE = 1.01
UNITS = {
    "n_params": "non-embedding parameters",
    "tokens": "tokens trained on",
    "lr": "peak learning rate",
    "loss": "nats/token",
    "batch_tokens": "tokens",
}
TOKENS_PER_PARAM = (1e-4, 1e7)  # outside this range the units of n_params or tokens are doubtful
MAX_STEPS = 1e7  # above this the unit of batch_tokens is doubtful
OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
STATUSES = ("done", "diverged", "failed")


def main_sweep(trials: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The proxies of a study without its comparison and validation sweeps, and {id: reason}."""
    if "sweep" not in trials or not (trials["sweep"] == "main").any():
        return trials, {}
    others = trials[trials["sweep"] != "main"]
    reasons = {
        run: f"belongs to the sweep {sweep!r}, not to the study's proxies"
        for run, sweep in zip(others["id"], others["sweep"], strict=True)
    }
    return trials[trials["sweep"] == "main"], reasons


def tabulate(trials: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """Copies a table of runs with checked numbers in the `needed` columns.

    Adds `id`, `seed`, `status` and `batch_tokens` if they are missing, `cell` (a number per
    setting), and `crossed`: whether every run has a seed, so that its effect can be estimated.
    Rows are sorted, so that the result of a fit does not depend on their order.
    """
    if not len(trials):
        raise UserError("a fit needs at least one trial, but the table is empty")
    for column in needed:
        if column not in trials.columns:
            raise UserError(_missing_column(trials, column))
    out = trials.reset_index(drop=True).copy()
    out["status"] = _statuses(out)
    for column in needed:
        given = out[column]
        out[column] = pd.to_numeric(given, errors="coerce").astype(float)
        if column != "loss":
            _require_positive(out[column], given)
    out["batch_tokens"] = (
        pd.to_numeric(out["batch_tokens"], errors="coerce").astype(float)
        if "batch_tokens" in out
        else np.nan
    )
    out["cell"] = out.groupby(
        [_group_scales(out["n_params"]), _group_scales(out["tokens"])]
    ).ngroup()
    out["id"] = _ids(out)
    out["crossed"] = "seed" in out and bool(out["seed"].notna().all())
    if not out["crossed"].all():
        same = [c for c in ("n_params", "tokens", "batch_tokens", "lr") if c in out]
        out["seed"] = out.groupby(same, dropna=False).cumcount()
    order = [column for column in ("cell", "batch_tokens", "lr", "seed", "id") if column in out]
    return out.sort_values(order, kind="stable").reset_index(drop=True)


def _missing_column(trials: pd.DataFrame, column: str) -> str:
    names = ", ".join(map(str, trials.columns))
    wrong_separator = len(trials.columns) == 1 and set(";\t") & set(names)
    return (
        f"trials must have a column `{column}` ({UNITS[column]}), but the columns are: {names}"
        + ("; separate them by commas" if wrong_separator else "")
    )


def _ids(table: pd.DataFrame) -> pd.Series:
    """The column `id`; row numbers if there is none, or if an id names a cell and not a run."""
    rows = pd.Series([f"row{i}" for i in range(len(table))], index=table.index)
    if "id" not in table:
        return rows
    ids = table["id"].astype(str)
    repeated = ids.duplicated()
    if not repeated.any():
        return ids
    if len(set(zip(ids, table["cell"], strict=True))) == ids.nunique() == table["cell"].nunique():
        return rows
    raise UserError(
        "the id of a trial must be unique, or name its setting, "
        f"but {ids[repeated].iloc[0]!r} occurs twice"
    )


def _statuses(table: pd.DataFrame) -> pd.Series:
    """The column `status`, by default "done"; "done" without a finite loss becomes "diverged"."""
    finite = np.isfinite(pd.to_numeric(table["loss"], errors="coerce").astype(float))
    status = (
        table["status"].fillna("done").astype(str)
        if "status" in table
        else pd.Series("done", index=table.index)
    )
    unknown = sorted(set(status) - set(STATUSES))
    if unknown:
        raise UserError(
            f"the status of a trial must be one of {', '.join(STATUSES)}, "
            f"but got {unknown[0]!r}{nearest(unknown[0], STATUSES)}"
        )
    return status.where((status != "done") | finite, "diverged")


def unit_warnings(table: pd.DataFrame) -> list[str]:
    """Warnings about columns that seem to have the wrong unit."""
    warnings, ratio = [], table["tokens"] / table["n_params"]
    if ratio.min() < TOKENS_PER_PARAM[0] or ratio.max() > TOKENS_PER_PARAM[1]:
        warnings.append(
            f"tokens per parameter range from {ratio.min():.3g} to {ratio.max():.3g}: check that "
            "n_params and tokens are counts, not millions or billions, in every row"
        )
    if (steps := (table["tokens"] / table["batch_tokens"]).max()) > MAX_STEPS:
        warnings.append(
            f"tokens / batch_tokens is {steps:.3g} steps: check that batch_tokens counts tokens, "
            "not sequences, in every row"
        )
    return warnings


def _require_positive(values: pd.Series, given: pd.Series) -> None:
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        shown = repr(given.iloc[row])
        if not isinstance(given.iloc[row], str):
            shown = f"{values.iloc[row]:g}"
        raise UserError(
            f"`{values.name}` must be a number above 0 in every trial, but row {row} has {shown}"
        )


def _group_scales(values: pd.Series) -> pd.Series:
    return pd.Series(levels(values.to_numpy(float)), index=values.index)


def levels(values: np.ndarray) -> np.ndarray:
    """The number of each value's scale, from the lowest.

    A new scale starts where a value exceeds the first value of the last scale by more than the
    factor SAME_SCALE.
    """
    ordered = np.unique(values)
    firsts = [ordered[0]]
    while (i := int(np.searchsorted(ordered, SAME_SCALE * firsts[-1], side="right"))) < len(
        ordered
    ):
        firsts.append(ordered[i])
    return np.searchsorted(firsts, values, side="right") - 1


def n_levels(values: Any) -> int:
    """The number of different scales."""
    return int(levels(np.asarray(values, float)).max()) + 1


def select_rows(table: pd.DataFrame, expression: str) -> pd.Series:
    """Which rows satisfy `COLUMN OP NUMBER [and COLUMN OP NUMBER ...]`."""
    keep = pd.Series(True, index=table.index)
    for clause in re.split(r"\s+and\s+", expression.strip()):
        match = re.fullmatch(r"(\w+)\s*(<=|>=|==|!=|<|>)\s*(\S+)", clause.strip())
        if not match:
            raise UserError(
                f"a hold-out must read `COLUMN OP NUMBER`, joined by `and`, but got {clause!r}"
            )
        column, op, text = match.groups()
        if column not in COLUMNS:
            raise UserError(
                "a hold-out must name a column of the records, "
                f"but got {column!r}{nearest(column, COLUMNS)}"
            )
        if column not in table.columns:
            raise UserError(
                f"a hold-out must name a column of these trials, but they have no `{column}`"
            )
        try:
            number = float(text.replace("_", ""))
        except ValueError:
            raise UserError(
                f"a hold-out must compare `{column}` with a number, but got {text!r}"
            ) from None
        keep &= OPERATORS[op](pd.to_numeric(table[column], errors="coerce"), number)
    return keep


def held_out_cells(table: pd.DataFrame, expression: str) -> set[int]:
    """The cells that an expression holds out; it must select all runs of a cell or none."""
    mask = select_rows(table, expression)
    share = mask.groupby(table["cell"]).mean()
    if share.between(0, 1, inclusive="neither").any():
        raise UserError(
            f"a hold-out must take whole settings (n_params, tokens), but {expression!r} splits one"
        )
    if not mask.any() or mask.all():
        raise UserError(
            "a hold-out must take some settings and leave some, "
            f"but {expression!r} takes {'all' if mask.all() else 'none'}"
        )
    return {int(cell) for cell in share.index[share > 0]}
