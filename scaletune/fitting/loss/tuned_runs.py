"""The loss law on runs as they are: a table without an lr axis, every row a run whose lr someone else has tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.fitting.cross_validation import compare, summary
from scaletune.fitting.loss.law import ESTIMATORS
from scaletune.fitting.loss.model_selection import judge_forms, leave_sizes_out
from scaletune.fitting.loss.record import fit_loss_law
from scaletune.fitting.stats import resampling
from scaletune.fitting.table import held_out_cells, odd_units, tabulate
from scaletune.predicting import from_fit
from scaletune.records import Fit

ONE = (
    "tokenizer",
    "loss_unit",
    "unit",
    "eval",
    "loss_split",
    "param_count",
)  # what makes losses, or sizes, of two rows incomparable
SOFT = ("train_dataset", "dataset", "schedule", "source")  # what moves a law, and may be meant
DRAWN = 1000  # rows that a record keeps, to be drawn
MISFIT = 0.02  # sd of ln L about the law from which the form is said not to fit

Array = NDArray[np.float64]


def prepare(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """`tokens` from `flops` where they are not given, in floating point, and what to say of columns that mix runs of several kinds."""
    for column in ONE:
        if column in trials and trials[column].nunique() > 1:
            values = ", ".join(repr(v) for v in list(trials[column].dropna().unique())[:3])
            raise UserError(
                f"a loss law is of one `{column}`, but the runs have {values}: their losses cannot be compared, fit them apart"
            )
    said = [
        f"`{c}` differs between runs ({trials[c].nunique()} values): one law goes through all"
        for c in SOFT
        if c in trials and trials[c].nunique() > 1
    ]
    if "tokens" in trials or not {"flops", "n_params"} <= set(trials):
        return trials, said
    flops = pd.to_numeric(trials["flops"], errors="coerce").astype(float)
    if (flops < 0).any():
        raise UserError(
            f"`flops` must be above 0, but row {int((flops < 0).argmax())} has {flops.min():g}: 6 * n_params * tokens overflowed int64"
        )
    tokens = flops / (6.0 * pd.to_numeric(trials["n_params"], errors="coerce").astype(float))
    return trials.assign(tokens=tokens), [*said, "`tokens` was taken as flops / (6 * n_params)"]


def fit_rows(
    trials: pd.DataFrame,
    law: str,
    holdout: str | None,
    fixed: Mapping[str, float | str] | None,
    level: float,
) -> Fit:
    """The law through every usable row; duplicates dropped, checkpoints of one run resampled together, judged on rows it has not seen."""
    trials, said = prepare(trials)
    table = tabulate(trials, ["n_params", "tokens", "loss"])
    held = table["cell"].isin(held_out_cells(table, holdout) if holdout else ())
    dropped = _dropped(table)
    rows = table[~table["id"].isin(dropped) & ~held]
    if rows.empty:
        raise UserError(
            f"a fit needs at least one usable run, but of {len(table)} none is both done and not held out"
        )
    cluster, clustered = resampling.clusters(rows)
    data = (
        rows["n_params"].to_numpy(float),
        rows["tokens"].to_numpy(float),
        rows["loss"].to_numpy(float),
    )
    how: dict[str, Any] = {
        "estimator": ESTIMATORS[law],
        "fixed": fixed,
        "weight": _weight(rows),
        "cluster": cluster,
    }
    part = fit_loss_law(*data, level=level, **how)
    notes = [
        *said,
        *odd_units(rows),
        *([clustered] if clustered else []),
        *_repeats(dropped),
        *part["said"],
        *_misfit(part),
        *judge_forms(*data),
    ]
    points = {
        "points": [list(row) for row in zip(*(column.tolist() for column in data), strict=True)][
            :DRAWN
        ]
    }
    result = Fit(
        law=law,
        params=part["params"],
        solution=part["solution"] | points,
        objective=part["objective"],
        ranges={
            column: [float(rows[column].min()), float(rows[column].max())]
            for column in ("n_params", "tokens")
        },
        used=list(rows["id"]),
        dropped=dropped,
        status=notes or ["ok"],
        level=level,
        assumptions=[
            "every row is a run at a well-tuned lr: the table has no lr axis to find floors on"
        ],
        provenance={"trials": len(trials), "holdout": holdout},
    )
    return (
        _judged(result, table[~table["id"].isin(dropped) & held], holdout)
        if holdout
        else _left_out(result, data, how)
    )


def _left_out(result: Fit, data: tuple[Array, Array, Array], how: dict[str, Any]) -> Fit:
    return replace(result, held_out=leave_sizes_out(*data, level=result.level, **how))


def _judged(result: Fit, unseen: pd.DataFrame, holdout: str) -> Fit:
    judged = []
    for n_params, tokens, loss in unseen[["n_params", "tokens", "loss"]].to_numpy(float).tolist():
        cell = {
            "n_params": n_params,
            "tokens": tokens,
            "status": "one run, no lr axis",
            "floor": loss,
            "floor_se": 0.0,
        }
        judged.append(compare(from_fit(result, n_params=n_params, tokens=tokens), cell))
    held_out = summary(f"hold-out: {holdout}", judged, runs=list(unseen["id"]))
    return replace(result, held_out=held_out)


def _dropped(table: pd.DataFrame) -> dict[str, str]:
    """{id: reason} of rows that did not finish, and of rows that repeat another's settings and loss."""
    reasons = dict(zip(table["id"], table["status"], strict=True))
    columns = [
        c
        for c in (
            "n_params",
            "tokens",
            "batch_tokens",
            "lr",
            "loss",
            "width",
            "depth",
            "weight_decay",
        )
        if c in table
    ]
    again = table.duplicated(columns) & (table["status"] == "done")
    reasons |= dict.fromkeys(
        table.loc[again, "id"], "the same settings and loss as another run: a duplicate"
    )
    return {run: reason for run, reason in reasons.items() if reason != "done"}


def _repeats(dropped: dict[str, str]) -> list[str]:
    """What to say of duplicates."""
    n = sum(reason.endswith("duplicate") for reason in dropped.values())
    return (
        [f"{n} run{'s repeat' if n > 1 else ' repeats'} the settings and loss of another: dropped"]
        if n
        else []
    )


def _weight(rows: pd.DataFrame) -> Array | None:
    if "weight" not in rows:
        return None
    weight = pd.to_numeric(rows["weight"], errors="coerce").to_numpy(float)
    if not (np.isfinite(weight).all() and (weight > 0).all()):
        raise UserError(
            f"`weight` must be a number above 0 in every run, but got {np.nanmin(weight):g}"
        )
    return weight


def _misfit(part: dict[str, Any]) -> list[str]:
    scatter = part["solution"]["scatter"]
    return (
        [f"the form does not fit these runs: they scatter by {scatter:.1%} about it"]
        if scatter > MISFIT
        else []
    )
