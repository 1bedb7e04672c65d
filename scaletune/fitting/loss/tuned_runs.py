"""Fits the loss law to runs without an lr axis: each row is a run at a well-tuned lr."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.fitting.column_warnings import column_doubts, put_first
from scaletune.fitting.cross_validation import compare, summarize
from scaletune.fitting.loss.law import ESTIMATORS
from scaletune.fitting.loss.model_selection import better_form, leave_sizes_out
from scaletune.fitting.loss.record import fit_loss_law
from scaletune.fitting.stats import resampling
from scaletune.fitting.table import held_out_cells, status_reasons, tabulate
from scaletune.predicting import from_fit
from scaletune.records import Fit

# Columns that make the losses or sizes of two rows incomparable.
MUST_MATCH = ("tokenizer", "loss_unit", "unit", "eval", "loss_split", "param_count")
# Columns that change the law, but may differ on purpose.
MAY_DIFFER = ("train_dataset", "dataset", "schedule", "source")
MAX_POINTS = 1000  # rows that a fit keeps for plots
MAX_HELD = 2000  # held-out rows that are predicted
MAX_SCATTER = 0.02  # sd of ln L around the law from which the form does not fit
DUPLICATE = "duplicate: the same settings and loss as another run"
SETTINGS = ("n_params", "tokens", "batch_tokens", "lr", "loss", "width", "depth", "weight_decay")

Array = NDArray[np.float64]


def prepare_runs(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Adds `tokens`, computed from `flops` if they are missing, and returns warnings.

    The computation is in floating point.
    """
    for column in MUST_MATCH:
        if column in trials and trials[column].nunique() > 1:
            values = ", ".join(repr(v) for v in list(trials[column].dropna().unique())[:3])
            raise UserError(
                f"a loss law needs runs with one `{column}`, but got {values}: their losses are "
                "not comparable; fit each value separately"
            )
    warnings = [
        f"`{c}` differs between runs ({trials[c].nunique()} values), but one law is fitted to all "
        "of them; fit each value separately if their losses are not comparable"
        for c in MAY_DIFFER
        if c in trials and trials[c].nunique() > 1
    ]
    if "tokens" in trials or not {"flops", "n_params"} <= set(trials):
        return trials, warnings
    flops = pd.to_numeric(trials["flops"], errors="coerce").astype(float)
    if (flops < 0).any():
        raise UserError(
            f"`flops` must be above 0, but row {int((flops < 0).argmax())} has {flops.min():g}: "
            "6 * n_params * tokens overflowed int64; compute it in floating point"
        )
    tokens = flops / (6.0 * pd.to_numeric(trials["n_params"], errors="coerce").astype(float))
    return trials.assign(tokens=tokens), [
        *warnings,
        "`tokens` is computed as flops / (6 * n_params)",
    ]


def fit_tuned_runs(
    trials: pd.DataFrame,
    law: str,
    holdout: str | None,
    fixed: Mapping[str, float | str] | None,
    level: float,
) -> Fit:
    """Fits the loss law to every usable row.

    Duplicates are dropped, checkpoints of one run are resampled together, and the law is tested on
    rows that were left out.
    """
    trials, warnings = prepare_runs(trials)
    table = tabulate(trials, ["n_params", "tokens", "loss"])
    held = table["cell"].isin(held_out_cells(table, holdout) if holdout else ())
    dropped = _drop_reasons(table)
    rows = table[~table["id"].isin(dropped) & ~held]
    if rows.empty:
        raise UserError(
            "a fit needs at least one usable run, "
            f"but none of {len(table)} is both done and not held out"
        )
    cluster, cluster_warning = resampling.find_clusters(rows)
    data = (
        rows["n_params"].to_numpy(float),
        rows["tokens"].to_numpy(float),
        rows["loss"].to_numpy(float),
    )
    how: dict[str, Any] = {
        "estimator": ESTIMATORS[law],
        "fixed": fixed,
        "weight": _row_weights(rows),
        "cluster": cluster,
    }
    part = fit_loss_law(*data, level=level, **how)
    status = [
        *part["unmeasured"],
        *warnings,
        *([cluster_warning] if cluster_warning else []),
        *_duplicate_warning(dropped),
        *part["warnings"],
        *_misfit_warning(part),
        *better_form(*data),
    ]
    points = [list(row) for row in zip(*(column.tolist() for column in data), strict=True)]
    result = Fit(
        law=law,
        params=part["params"],
        solution=part["solution"] | {"points": points[:MAX_POINTS]},
        objective=part["objective"],
        ranges={
            column: [float(rows[column].min()), float(rows[column].max())]
            for column in ("n_params", "tokens")
        },
        used=list(rows["id"]),
        dropped=dropped,
        status=status or ["ok"],
        level=level,
        assumptions=[
            "every row is a run at a well-tuned lr, because the table has no lr axis from which a "
            "minimum loss could be found"
        ],
        provenance={"trials": len(trials), "holdout": holdout},
    )
    result = put_first(result, column_doubts(trials, result, stated=(*MUST_MATCH, *MAY_DIFFER)))
    if holdout:
        return _validate(result, table[~table["id"].isin(dropped) & held], holdout)
    return _cross_validate(result, data, how)


def _cross_validate(result: Fit, data: tuple[Array, Array, Array], how: dict[str, Any]) -> Fit:
    return replace(result, held_out=leave_sizes_out(*data, level=result.level, **how))


def _validate(result: Fit, unseen: pd.DataFrame, holdout: str) -> Fit:
    comparisons, kind = [], f"hold-out: {holdout}"
    held = unseen
    if len(unseen) > MAX_HELD:  # evenly spaced: the rows are sorted by setting
        held = unseen.iloc[np.linspace(0, len(unseen) - 1, MAX_HELD).astype(int)]
        kind += f" ({MAX_HELD} of {len(unseen)} runs)"
    for n_params, tokens, loss in held[["n_params", "tokens", "loss"]].to_numpy(float).tolist():
        cell = {
            "n_params": n_params,
            "tokens": tokens,
            "status": "one run at one lr: the optimal lr is not measured",
            "floor": loss,
            "floor_se": 0.0,
        }
        comparisons.append(compare(from_fit(result, n_params=n_params, tokens=tokens), cell))
    held_out = summarize(kind, comparisons, runs=list(unseen["id"]))
    return replace(result, held_out=held_out)


def _drop_reasons(table: pd.DataFrame) -> dict[str, str]:
    """{id: reason} of rows that did not finish, and of rows that repeat another row."""
    columns = [column for column in SETTINGS if column in table]
    repeated = table.duplicated(columns) & (table["status"] == "done")
    return status_reasons(table) | dict.fromkeys(table.loc[repeated, "id"], DUPLICATE)


def _duplicate_warning(dropped: dict[str, str]) -> list[str]:
    n = sum(reason == DUPLICATE for reason in dropped.values())
    if not n:
        return []
    runs = "1 run repeats" if n == 1 else f"{n} runs repeat"
    return [f"{runs} the settings and loss of another run: dropped"]


def _row_weights(rows: pd.DataFrame) -> Array | None:
    if "weight" not in rows:
        return None
    weight = pd.to_numeric(rows["weight"], errors="coerce").to_numpy(float)
    if not (np.isfinite(weight).all() and (weight > 0).all()):
        raise UserError(
            f"`weight` must be a number above 0 in every run, but got {np.nanmin(weight):g}"
        )
    return weight


def _misfit_warning(part: dict[str, Any]) -> list[str]:
    scatter = part["solution"]["scatter"]
    if scatter <= MAX_SCATTER:
        return []
    return [
        f"the loss law does not fit these runs: their scatter around it is {scatter:.1%}; check "
        "that all losses have one unit, one tokenizer and one data set"
    ]
