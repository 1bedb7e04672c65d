"""Checks a table of runs and groups its rows into cells.

A cell is one setting: one (n_params, tokens). Sizes or token budgets that differ by less than 1 %
count as equal. Also says why a run is not used, and which settings a hold-out takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError, nearest
from scaletune.fitting.missing_columns import require_columns
from scaletune.records.expressions import select

# Values closer than this factor are one scale: steps * batch_tokens rounds differently in each run.
SAME_SCALE = 1.01
UNITS = {
    "n_params": "non-embedding parameters",
    "tokens": "tokens trained on",
    "lr": "peak learning rate",
    "loss": "nats/token",
    "batch_tokens": "tokens",
}
STATUSES = ("done", "diverged", "stopped", "failed")
COMPUTED = ["cell", "crossed"]  # columns that `tabulate` adds and that no expression may name


def main_sweep(trials: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The proxies of a study without its comparison and validation sweeps, and {id: reason}."""
    if "sweep" not in trials or not (trials["sweep"] == "main").any():
        return trials, {}
    main = trials["sweep"].isna() | (trials["sweep"] == "main")  # or of another tool
    others = trials[~main]
    reasons = {
        run: f"belongs to the sweep {sweep!r}, not to the study's proxies"
        for run, sweep in zip(others["id"], others["sweep"], strict=True)
    }
    return trials[main], reasons


def tabulate(trials: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """Copies a table of runs with checked numbers in the `needed` columns.

    Adds `id`, `seed`, `status` and `batch_tokens` if they are missing, `cell` (a number per
    setting), and `crossed`: whether every run has a seed, so that its effect can be estimated.
    Rows are sorted, so that the result of a fit does not depend on their order.
    """
    if not len(trials):
        raise UserError("a fit needs at least one trial, but the table is empty")
    require_columns(trials, {column: UNITS[column] for column in needed}, "a fit or a plot")
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


def _ids(table: pd.DataFrame) -> pd.Series:
    """The column `id`; row numbers if there is none, or if an id names a cell and not a run."""
    rows = pd.Series([f"row{i}" for i in range(len(table))], index=table.index)
    if "id" not in table:
        return rows
    ids = table["id"].astype(str)
    repeated = ids.duplicated()
    if not repeated.any():
        return ids
    if "seed" in table and not table[["seed"]].assign(id=ids).duplicated().any():
        return ids + "#" + table["seed"].astype(str)
    if len(set(zip(ids, table["cell"], strict=True))) == ids.nunique() == table["cell"].nunique():
        return rows
    raise UserError(
        "the id of a trial must be unique, or name its setting, "
        f"but {ids[repeated].iloc[0]!r} occurs twice: leave one of them out with --where, or name"
        " the column that tells the runs apart, as in --map id=run_id"
    )


def _statuses(table: pd.DataFrame) -> pd.Series:
    """The column `status`, by default "done"; "done" without a finite loss becomes "diverged"."""
    losses = pd.to_numeric(table["loss"], errors="coerce").astype(float)
    finite = np.isfinite(losses)
    if (losses[finite] > 0).mean() > 0.5:  # else the loss is another quantity, as a score
        finite &= losses > 0  # people write -1 or 0 for a run that diverged
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


def _require_positive(values: pd.Series, given: pd.Series) -> None:
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        value = given.iloc[row]
        shown = repr(value) if isinstance(value, str) else f"{values.iloc[row]:g}"
        if isinstance(value, str) and any(map(str.isdigit, value)):
            shown += ": write plain numbers, without units or separators"
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


def status_reasons(table: pd.DataFrame) -> dict[str, str]:
    """{id: reason} of the runs that are not done: the status, and the message of the run.

    Importers and sweeps write into `message` why a run is not done.
    """
    rows = table[table["status"] != "done"]
    messages = rows["message"].fillna("").astype(str) if "message" in rows else [""] * len(rows)
    return {
        run: unfinished_reason(status, text)
        for run, status, text in zip(rows["id"], rows["status"], messages, strict=True)
    }


def unfinished_reason(status: str, message: str) -> str:
    """Why a run that is not done is dropped: "failed: 4 of 10 steps", "stopped early: at ..."."""
    text = " ".join(message.split())
    if status == "stopped":
        status, text = "stopped early", text.removeprefix(status).strip()
    return f"{status}: {text}" if text and not text.startswith(status) else text or status


def set_incomplete_aside(
    trials: pd.DataFrame, columns: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """The runs that have a value in every column, and {id: reason} of the others.

    A run that did not finish often lacks its settings. A finished run without a value is left out
    too if most runs have one; otherwise it stays, and the check of the table reports it.
    """
    done = _is_done(trials)
    reasons = pd.Series("", index=trials.index)
    for column in [name for name in columns if name in trials]:
        missing = trials[column].isna()
        few = bool((missing & done).sum() < 0.5 * max(done.sum(), 1))
        reasons = reasons.mask(missing & (~done | few) & (reasons == ""), f"it has no `{column}`")
    aside = reasons != ""
    if not aside.any():
        return trials, {}
    if "id" not in trials:
        trials = trials.assign(id=[f"row{i}" for i in range(len(trials))])
    named = trials[aside].assign(id=trials["id"].astype(str))
    unfinished = status_reasons(named[~done[aside]]) if "status" in named else {}
    dropped = dict(zip(named["id"], reasons[aside], strict=True)) | unfinished
    return trials[~aside], dropped


def _is_done(trials: pd.DataFrame) -> pd.Series:
    if "status" not in trials:
        return pd.Series(True, index=trials.index)
    return trials["status"].fillna("done") == "done"


def select_runs(trials: pd.DataFrame, expression: str) -> pd.DataFrame:
    """The rows that satisfy an expression; UserError if there are none.

    A run without a status is done, and a run without an id keeps the number of its row.
    """
    if "id" not in trials:
        trials = trials.assign(id=[f"row{i}" for i in range(len(trials))])
    if "status" in trials:
        trials = trials.assign(status=trials["status"].fillna("done"))
    kept = select(trials, expression, "`where`")
    if not kept.any():
        raise UserError(
            f"`where` must select at least one row, but {expression!r} selects none of"
            f" {len(trials)}"
        )
    return trials[kept]


def held_out_cells(table: pd.DataFrame, expression: str) -> set[int]:
    """The cells that an expression holds out; it must select all runs of a cell or none."""
    mask = select(table.drop(columns=COMPUTED), expression, "a hold-out")
    share = mask.groupby(table["cell"]).mean()
    split = share.index[share.between(0, 1, inclusive="neither")]
    if len(split):
        rows = table[table["cell"] == split[0]]
        ends = (
            f"{column} {rows[column].min():.4g} to {rows[column].max():.4g}"
            for column in ("n_params", "tokens")
        )
        raise UserError(
            f"a hold-out must take whole settings (n_params, tokens), but {expression!r} splits one"
            f" with {' and '.join(ends)}"
        )
    if not mask.any() or mask.all():
        raise UserError(
            "a hold-out must take some settings and leave some, "
            f"but {expression!r} takes {'all' if mask.all() else 'none'}"
        )
    return {int(cell) for cell in share.index[share > 0]}
