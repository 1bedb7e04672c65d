"""From anyone's runs to cells: the columns a fit needs, checked; runs of one scale grouped; what is unusable named."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError, nearest
from scaletune.records import COLUMNS

SAME = 1.01  # sizes or token counts closer than this factor are one scale: steps * batch_tokens rounds differently in each run
UNITS = {
    "n_params": "non-embedding parameters",
    "tokens": "tokens trained on",
    "lr": "peak learning rate",
    "loss": "nats/token",
    "batch_tokens": "tokens",
}
RATIOS = (1e-4, 1e7)  # tokens a parameter, and
STEPS = 1e7  # steps, that nobody trains with
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
    """A study's own proxies, without its comparisons and its validation; {id: reason} of those."""
    if "sweep" not in trials or not (trials["sweep"] == "main").any():
        return trials, {}
    rest = trials[trials["sweep"] != "main"]
    reasons = {
        run: f"of the sweep {sweep!r}, not of the study's proxies"
        for run, sweep in zip(rest["id"], rest["sweep"], strict=True)
    }
    return trials[trials["sweep"] == "main"], reasons


def tabulate(trials: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """A copy of `trials` with checked numbers in the `needed` columns, and `id`, `seed`, `status`, `batch_tokens` and `cell` in any case."""
    if not len(trials):
        raise UserError("a fit needs at least one trial, but the table is empty")
    for column in needed:
        if column not in trials.columns:
            names = ", ".join(map(str, trials.columns))
            hint = (
                "; separate them by commas"
                if len(trials.columns) == 1 and set(";\t") & set(names)
                else ""
            )
            raise UserError(
                f"trials must have a column `{column}` ({UNITS[column]}), but the columns are: {names}{hint}"
            )
    out = trials.reset_index(drop=True).copy()
    out["status"] = _statuses(out)
    for column in needed:
        said = out[column]
        out[column] = pd.to_numeric(said, errors="coerce").astype(float)
        if column != "loss":
            _require_positive(out[column], said)
    out["batch_tokens"] = (
        pd.to_numeric(out["batch_tokens"], errors="coerce").astype(float)
        if "batch_tokens" in out
        else np.nan
    )
    out["cell"] = out.groupby([_groups(out["n_params"]), _groups(out["tokens"])]).ngroup()
    out["id"] = _ids(out)
    out["crossed"] = "seed" in out and bool(
        out["seed"].notna().all()
    )  # the same seeds at every lr: their common part can be taken out
    if not out["crossed"].all():
        out["seed"] = out.groupby(
            [c for c in ("n_params", "tokens", "batch_tokens", "lr") if c in out], dropna=False
        ).cumcount()
    order = [column for column in ("cell", "batch_tokens", "lr", "seed", "id") if column in out]
    return out.sort_values(order, kind="stable").reset_index(
        drop=True
    )  # sums, and so the answer, do not depend on the order of rows


def _ids(table: pd.DataFrame) -> pd.Series:
    """`id`; the row's number where there is none, or where it names cells and not runs."""
    rows = pd.Series([f"row{i}" for i in range(len(table))], index=table.index)
    if "id" not in table:
        return rows
    ids = table["id"].astype(str)
    again = ids.duplicated()
    if not again.any():
        return ids
    if len(set(zip(ids, table["cell"], strict=True))) == ids.nunique() == table["cell"].nunique():
        return rows
    raise UserError(
        f"a trial's id must be its own, or its cell's, but {ids[again].iloc[0]!r} occurs twice"
    )


def _statuses(table: pd.DataFrame) -> pd.Series:
    """`status`, or what the loss says of it; a "done" without a finite loss has diverged."""
    finite = np.isfinite(pd.to_numeric(table["loss"], errors="coerce").astype(float))
    status = (
        table["status"].fillna("done").astype(str)
        if "status" in table
        else pd.Series("done", index=table.index)
    )
    unknown = sorted(set(status) - set(STATUSES))
    if unknown:
        raise UserError(
            f"a trial's status must be one of {', '.join(STATUSES)}, but got {unknown[0]!r}{nearest(unknown[0], STATUSES)}"
        )
    return status.where((status != "done") | finite, "diverged")


def odd_units(table: pd.DataFrame) -> list[str]:
    """What to say of columns that look as if they were not the counts of the contract."""
    said, ratio = [], table["tokens"] / table["n_params"]
    if ratio.min() < RATIOS[0] or ratio.max() > RATIOS[1]:
        said.append(
            f"tokens per parameter go from {ratio.min():.3g} to {ratio.max():.3g}: are both columns counts, not millions or billions, in every row?"
        )
    if (steps := (table["tokens"] / table["batch_tokens"]).max()) > STEPS:
        said.append(
            f"tokens / batch_tokens comes to {steps:.3g} steps: is batch_tokens in tokens, not in sequences, in every row?"
        )
    return said


def _require_positive(values: pd.Series, said: pd.Series) -> None:
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        shown = repr(said.iloc[row]) if isinstance(said.iloc[row], str) else f"{values.iloc[row]:g}"
        raise UserError(
            f"`{values.name}` must be a number above 0 in every trial, but row {row} has {shown}"
        )


def _groups(values: pd.Series) -> pd.Series:
    """Number the scales that `values` are of."""
    return pd.Series(levels(values.to_numpy(float)), index=values.index)


def levels(values: np.ndarray) -> np.ndarray:
    """Number scales from the lowest: a new one wherever a value exceeds the first of its scale by more than the factor SAME."""
    ordered = np.unique(values)
    firsts = [ordered[0]]
    while (i := int(np.searchsorted(ordered, SAME * firsts[-1], side="right"))) < len(ordered):
        firsts.append(ordered[i])
    return np.searchsorted(firsts, values, side="right") - 1


def n_levels(values: Any) -> int:
    """How many scales `values` are of."""
    return int(levels(np.asarray(values, float)).max()) + 1


def matches(table: pd.DataFrame, expression: str) -> pd.Series:
    """Which rows satisfy `COLUMN OP NUMBER [and COLUMN OP NUMBER ...]`; columns are those of the contract."""
    keep = pd.Series(True, index=table.index)
    for clause in re.split(r"\s+and\s+", expression.strip()):
        found = re.fullmatch(r"(\w+)\s*(<=|>=|==|!=|<|>)\s*(\S+)", clause.strip())
        if not found:
            raise UserError(
                f"a hold-out must read `COLUMN OP NUMBER`, joined by `and`, but got {clause!r}"
            )
        column, op, text = found.groups()
        if column not in COLUMNS:
            raise UserError(
                f"a hold-out must name a column of the records, but got {column!r}{nearest(column, COLUMNS)}"
            )
        if column not in table.columns:
            raise UserError(
                f"a hold-out must name a column these trials have, but they have no `{column}`"
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
    """The cells an expression takes out, whole: a law is judged on scales it has not seen, not on runs of a scale it has."""
    mask = matches(table, expression)
    share = mask.groupby(table["cell"]).mean()
    if share.between(0, 1, inclusive="neither").any():
        raise UserError(
            f"a hold-out must take whole (n_params, tokens) cells, but {expression!r} splits one"
        )
    if not mask.any() or mask.all():
        raise UserError(
            f"a hold-out must take some cells and leave some, but {expression!r} takes {'all' if mask.all() else 'none'}"
        )
    return {int(cell) for cell in share.index[share > 0]}
