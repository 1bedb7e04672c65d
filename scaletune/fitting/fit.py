"""Fits a law to trials: `fit` takes a table of trials and returns a `Fit`.

The steps for a law of the learning rate: check the table (table.py), find the optimum of each
setting (optimum/), fit a power law to the optima (optimum/power_law.py) and a loss law to the
minimum losses (loss/), then test both on settings that were left out (cross_validation.py).
The code calls a setting a cell. The joint law is in joint/, all other relations are in relations/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from scaletune.errors import UserError, nearest
from scaletune.fitting.cross_validation import compare, summarize
from scaletune.fitting.joint.fit import fit_joint, hold_out
from scaletune.fitting.loss.law import ESTIMATORS
from scaletune.fitting.loss.record import fit_loss_law
from scaletune.fitting.loss.tuned_runs import fit_tuned_runs, prepare_runs
from scaletune.fitting.optimum.cells import add_optima, choose_batches, split_cells
from scaletune.fitting.optimum.lr_basin import BAND, MISFIT
from scaletune.fitting.optimum.power_law import fit_power_law
from scaletune.fitting.relations import RELATIONS, fit_relation
from scaletune.fitting.shared_settings import (
    common_setting,
    describe_setting,
    differing_settings,
)
from scaletune.fitting.table import held_out_cells, main_sweep, tabulate, unit_warnings
from scaletune.importing import trials as read_table
from scaletune.predicting import LOSS_LAWS, Prediction, from_fit
from scaletune.records import Fit

LAWS = {
    # lr = c * n_params**a * tokens**b
    "lr_nd": ("n_params", "tokens"),
    # lr = c * n_params**a * tokens**b * batch_tokens**d
    "lr_ndb": ("n_params", "tokens", "batch_tokens"),
    # E + A / n_params**alpha + B / tokens**beta, with the estimator that extrapolates best
    "loss_nd": ("n_params", "tokens"),
    # the same form with the published objective
    "chinchilla": ("n_params", "tokens"),
    # loss as a function of lr and batch size at every scale: surface/model.py
    "joint": ("n_params", "tokens", "batch_tokens"),
}
LEVEL = 0.95  # of every interval
MIN_DOF = 1  # degrees of freedom that a law keeps when one cell is left out
CV_DRAWS = 100  # resamples of the loss law in cross-validation

Row = dict[str, Any]


@dataclass
class MeasuredCells:
    """Cells with their optima, the runs that were left out, and the warnings."""

    rows: list[Row]
    """One row per cell, or per cell and batch size."""

    dropped: dict[str, str] = field(default_factory=dict)
    """Trial id -> reason."""

    warnings: list[str] = field(default_factory=list)

    noise: tuple[float, int] = (0.0, 0)
    """Variance of the loss of one run, and its degrees of freedom."""

    level: float = LEVEL

    batch_warnings: list[str] = field(default_factory=list)
    """Warnings about the choice of a batch size; empty if each cell has one batch size."""

    @property
    def usable(self) -> list[Row]:
        """Cells with an optimum; if no cell has one inside its grid, cells with a bound on it."""
        return [row for row in self.rows if row["status"] == "ok"] or [
            row for row in self.rows if "x" in row
        ]


def fit(
    trials: pd.DataFrame | str | Path,
    law: str = "lr_nd",
    *,
    holdout: str | None = None,
    fixed: Mapping[str, float | str] | None = None,
    level: float = LEVEL,
) -> Fit:
    """Fits a law to runs.

    A setting is one pair (n_params, tokens). For a law of the learning rate, each setting needs
    runs at three or more learning rates, with the lowest loss inside the range. A quantity that the
    runs do not identify does not raise an error: `Fit.status` says what is missing.

    Args:
        trials: A table with one row per run, or a file that `scaletune.importing.trials` reads
            (.jsonl, .csv, .parquet, exports of W&B and TensorBoard). Columns: `n_params`
            (non-embedding parameters), `tokens`, `lr` (peak) and `loss` (nats/token); optional:
            `batch_tokens`, `seed`, `status` ("done", "diverged", "failed") and `id`. A law of
            `fitting.RELATIONS` has its own columns.
        law: "lr_nd": lr = c * n_params**a * tokens**b. "lr_ndb": the same times batch_tokens**d.
            "joint": the loss as a function of lr and batch size at every scale. "chinchilla":
            E + A / n_params**alpha + B / tokens**beta with the published objective
            (arXiv:2203.15556, eq. 2; arXiv:2404.10102). "loss_nd": the same form with the
            estimator that extrapolates best. Or the id of one of `fitting.RELATIONS`.
        holdout: Settings that are not fitted but predicted, for example "n_params > 5e6 and
            tokens > 1e9". Without it, each setting is predicted from the others.
        fixed: Values of parameters of a loss law that are not fitted, or the exponent that another
            one equals: {"E": 1.69, "beta": "alpha"}. Only for runs without an lr axis.
        level: Coverage of every interval, between 0 and 1.

    Returns:
        The fitted law: `params` with intervals, `cells` with the optimum of each setting, `dropped`
        runs with reasons, `held_out` errors, and `status`, which is ["ok"] or a list of warnings.
        `Fit.predict` predicts the optimum at a target scale.

    Raises:
        UserError: The law is not known, a column is missing or has invalid values, or no setting is
            usable.

    Example:
        >>> import math
        >>> import pandas as pd
        >>> import scaletune as st
        >>> rows = []
        >>> for n_params in (1e6, 2e6, 4e6):
        ...     for tokens in (2e7, 8e7, 3.2e8):
        ...         best_lr = 4e-3 * (n_params / 2e6) ** -0.3
        ...         minimum_loss = 1.8 + 30 / n_params**0.3 + 60 / tokens**0.25
        ...         for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
        ...             loss = minimum_loss + 0.03 * math.log(lr / best_lr) ** 2
        ...             rows.append(dict(n_params=n_params, tokens=tokens, lr=lr, loss=loss))
        >>> fit = st.fit(pd.DataFrame(rows), law="lr_nd")
        >>> f"lr ~ n_params**{fit.params['a']['value']:.1f}"
        'lr ~ n_params**-0.3'
        >>> best = fit.predict(n_params=3.2e7, tokens=3.2e8)
        >>> f"lr {best.lr:.1e}, loss {best.loss:.1f}"
        'lr 1.8e-03, loss 2.4'
    """
    require_known_law(law)
    if not 0 < level < 1:
        raise UserError(f"`0 < level < 1` must hold, but got {level!r}")
    if isinstance(trials, pd.DataFrame):
        return _fit_table(trials, law, holdout, fixed, level)
    table, assumptions = read_table(trials)
    result = _fit_table(table, law, holdout, fixed, level)
    return replace(result, assumptions=[*result.assumptions, *assumptions])


def _fit_table(
    trials: pd.DataFrame,
    law: str,
    holdout: str | None,
    fixed: Mapping[str, float | str] | None,
    level: float,
) -> Fit:
    trials, other_sweeps = main_sweep(trials)
    if law in RELATIONS:
        if holdout or fixed:
            raise UserError(
                "a hold-out and fixed parameters are only for laws of n_params and tokens "
                f"({', '.join(LAWS)}), but got law={law!r}"
            )
        return fit_relation(trials, RELATIONS[law], level=level)
    if law in LOSS_LAWS and not _has_lr_axis(prepare_runs(trials)[0]):
        return fit_tuned_runs(trials, law, holdout, fixed, level)
    if fixed:
        raise UserError(
            "fixed parameters are only for a loss law of runs without an lr axis, "
            f"but got {', '.join(fixed)} for {law!r}"
        )
    table = tabulate(trials, [*LAWS[law], "lr", "loss"])
    held = table["cell"].isin(held_out_cells(table, holdout) if holdout else ())
    if law == "joint":
        joint = fit_joint(table[~held], _setting_warnings(table[~held]), level)
        result = _add_provenance(joint, trials, table, other_sweeps, holdout)
        return replace(result, held_out=hold_out(result, table[~held], table[held], holdout))
    cells = _measure_cells(table[~held], every_batch=law == "lr_ndb", level=level)
    _require_usable(cells)
    law, batch_warnings = _choose_law(law, cells)
    fitted = _fit_cells(law, cells, batch_warnings + _setting_warnings(table[~held]))
    result = _add_provenance(fitted, trials, table, other_sweeps, holdout)
    if not holdout:
        return replace(result, held_out=_cross_validate(law, cells))
    unseen = _measure_cells(
        table[held], every_batch=law == "lr_ndb", noise=cells.noise, level=level
    )
    comparisons = [compare(_predict(result, row), row) for row in unseen.rows]
    runs = list(table.loc[held, "id"])
    return replace(result, held_out=summarize(f"hold-out: {holdout}", comparisons, runs=runs))


def _require_usable(cells: MeasuredCells) -> None:
    if not cells.usable:
        reasons = [row["status"] for row in cells.rows]
        more = "; ..." if len(reasons) > 6 else ""
        raise UserError(
            f"a fit needs at least one usable setting, but {'; '.join(reasons[:6])}{more}"
        )


def _add_provenance(
    result: Fit,
    trials: pd.DataFrame,
    table: pd.DataFrame,
    other_sweeps: dict[str, str],
    holdout: str | None,
) -> Fit:
    """Adds the ranges of width and depth, the shared settings and the runs of other sweeps."""
    setting = common_setting(trials)
    provenance = {"trials": len(trials), "holdout": holdout, "setting": setting}
    return replace(
        result,
        ranges=result.ranges | _shape_ranges(table),
        dropped=result.dropped | other_sweeps,
        provenance=result.provenance | provenance,
        assumptions=[*describe_setting(setting), *result.assumptions],
    )


def require_known_law(law: str) -> None:
    """Raises a UserError, with the nearest name, if `law` cannot be fitted."""
    if law not in LAWS and law not in RELATIONS:
        hint = nearest(law, [*LAWS, *RELATIONS])
        raise UserError(f"a law must be one that can be fitted, but got {law!r}{hint}")


def measure(trials: pd.DataFrame) -> list[Row]:
    """Finds the optimal learning rate of every setting (n_params, tokens).

    Args:
        trials: One row per run, with columns `n_params`, `tokens`, `lr` and `loss`.

    Returns:
        One dict per setting: `lr` with `interval`, the minimum loss (`floor`) with its standard
        error, the fitted loss basin and the near-optimal `band`. If the setting has no optimum
        inside its grid, `status` says why.
    """
    table = tabulate(trials, ["n_params", "tokens", "lr", "loss"])
    return [_cell_record(row) for row in _measure_cells(table).rows]


def _has_lr_axis(trials: pd.DataFrame) -> bool:
    """Whether some cell has three or more learning rates, so that its minimum can be found."""
    if "lr" not in trials.columns or not len(trials):
        return False
    table = tabulate(trials, ["n_params", "tokens", "loss"])
    return bool((table.groupby("cell")["lr"].nunique() >= 3).any())


def _measure_cells(
    table: pd.DataFrame,
    *,
    every_batch: bool = False,
    noise: tuple[float, int] | None = None,
    level: float = LEVEL,
) -> MeasuredCells:
    """Finds the optimum of each cell, at its best batch size unless `every_batch`.

    The noise is `noise`, or is estimated from the table if `noise` is None.
    """
    rows, dropped = split_cells(table)
    cells = MeasuredCells(rows, dropped, noise=add_optima(rows, noise, level), level=level)
    if not every_batch:
        cells.rows, other_batches, cells.batch_warnings = choose_batches(rows)
        cells.dropped |= other_batches
    cells.warnings = [row["status"] for row in cells.rows if row["status"] != "ok"]
    if cells.usable and cells.usable[0]["status"] != "ok":
        cells.warnings.insert(
            0,
            "no setting has its lowest loss inside its lr grid: the law is fitted to the ends of "
            "the grids, so it gives a bound on the optimum; widen the lr grids",
        )
    for row in cells.rows:
        if row not in cells.usable:
            cells.dropped |= dict.fromkeys(row["ids"], row["status"])
    return cells


def _choose_law(law: str, cells: MeasuredCells) -> tuple[str, list[str]]:
    """The law with or without a batch exponent, and warnings about the batch sizes."""
    batches = {row["batch_tokens"] for row in cells.usable}
    if law == "lr_ndb" and None in batches:
        raise UserError("law 'lr_ndb' needs `batch_tokens` in every trial, but some have none")
    if cells.batch_warnings:
        return law, cells.batch_warnings
    if law == "lr_nd" and len(batches) > 1 and None not in batches:
        return "lr_ndb", [
            "batch_tokens differs between settings, so the fitted law is lr_ndb: it has a batch "
            "exponent"
        ]
    return law, []


def _setting_warnings(table: pd.DataFrame) -> list[str]:
    """Warnings about odd units and about settings that differ between the runs of one cell."""
    groups = table.groupby(["cell", "batch_tokens", "lr"], dropna=False)
    averaged = [
        f"`{column}` differs between runs of the same setting and lr: their losses are averaged; "
        "fit each value separately if it matters"
        for column in ("sweep", "width", "depth", "seq_len", "weight_decay")
        if column in table.columns and (groups[column].nunique() > 1).any()
    ]
    mixed = [
        f"`{name}` differs between runs of one setting: their losses are not comparable, so its "
        "optimum is unreliable; fit each value separately"
        for name in differing_settings(table)
    ]
    return [*unit_warnings(table), *averaged, *mixed]


def _fit_cells(
    law: str, cells: MeasuredCells, warnings: Sequence[str] = (), n_draws: int | None = None
) -> Fit:
    """Fits a law to cells with optima."""
    usable = cells.usable
    shared: dict[str, Any] = {
        "used": [i for row in usable for i in row["ids"]],
        "level": cells.level,
    }
    loss_law = law if law in LOSS_LAWS else "loss_nd"
    loss_part = _fit_minimum_losses(usable, loss_law, n_draws, cells.level)
    loss = _make_fit(loss_law, loss_part, ranges=_ranges(usable, loss_law), **shared)
    shared |= {
        "cells": [_cell_record(row) for row in cells.rows],
        "dropped": cells.dropped,
        "assumptions": _assumptions(),
        "provenance": {"noise_sd": float(np.sqrt(cells.noise[0])), "noise_dof": cells.noise[1]},
    }
    warnings = [*cells.warnings, *warnings]
    if law in LOSS_LAWS:
        points = [[row["n_params"], row["tokens"], row["floor"]] for row in _best_batches(usable)]
        status = [*warnings, *(sentence for sentence in loss.status if sentence != "ok")]
        solution = loss.solution | {"points": points}
        return replace(loss, solution=solution, status=status or ["ok"], **shared)
    part = fit_power_law(usable, list(LAWS[law]), cells.level)
    batches = {row["batch_tokens"] for row in usable if row["batch_tokens"] is not None}
    part["solution"]["batch_tokens"] = sorted(batches)
    return _make_fit(law, part, warnings, ranges=_ranges(usable, law), loss_law=loss, **shared)


def _make_fit(law: str, part: dict[str, Any], warnings: Sequence[str] = (), **fields: Any) -> Fit:
    return Fit(
        law=law,
        params=part["params"],
        solution=part["solution"],
        objective=part["objective"],
        status=[*warnings, *part["warnings"]] or ["ok"],
        **fields,
    )


def _assumptions() -> list[str]:
    return [
        "with t = ln(lr / optimal lr), loss is minimum + curvature * (exp(s t) - 1 - s t) / s**2, "
        f"with a form error of {MISFIT:.0%} of the rise above the minimum; the prior on the skew s "
        "comes from public sweeps",
        f"the near-optimal band is where the fitted loss is within {BAND:.2%} of the minimum loss",
        "settings deviate from the law independently, normally in ln lr, and the target deviates "
        "as much as the fitted settings",
    ]


def _fit_minimum_losses(
    usable: list[Row], law: str, n_draws: int | None, level: float
) -> dict[str, Any]:
    """Fits the loss law to the minimum loss of each cell."""
    n_params, tokens, minimum, se = (
        np.array([row[key] for row in _best_batches(usable)])
        for key in ("n_params", "tokens", "floor", "floor_se")
    )
    return fit_loss_law(
        n_params, tokens, minimum, se, level=level, n_draws=n_draws, estimator=ESTIMATORS[law]
    )


def _best_batches(usable: list[Row]) -> list[Row]:
    """Each cell at the batch size with the lowest minimum loss."""
    cells = sorted({row["cell"] for row in usable})
    return [
        min((row for row in usable if row["cell"] == cell), key=lambda row: row["floor"])
        for cell in cells
    ]


def _ranges(usable: list[Row], law: str) -> dict[str, list[float]]:
    return {
        column: [min(row[column] for row in usable), max(row[column] for row in usable)]
        for column in LAWS[law]
    }


def _shape_ranges(table: pd.DataFrame) -> dict[str, list[float]]:
    """Ranges of width and depth of the runs, if the table has them."""
    return {
        column: [float(table[column].min()), float(table[column].max())]
        for column in ("width", "depth")
        if column in table
    }


def _cell_record(row: Row) -> Row:
    """The row of a cell in `Fit.cells`: plain numbers, with learning rates beside their logs."""
    record = {key: value for key, value in row.items() if key not in ("points", "ids", "cell")}
    record["n_runs"] = len(row["ids"])
    if "x" in row:
        record["lr"] = float(np.exp(row["x"]))
        record["band"] = [
            float(np.exp(row["x"] + sign * width))
            for sign, width in zip((-1, 1), row["half_width"], strict=True)
        ]
    return record


def _predict(result: Fit, row: Row) -> Prediction:
    batch = row["batch_tokens"] if result.law == "lr_ndb" else None
    return from_fit(result, n_params=row["n_params"], tokens=row["tokens"], batch_tokens=batch)


def _cross_validate(law: str, cells: MeasuredCells) -> dict[str, Any]:
    """Predicts each cell from the others; empty if the others leave no degree of freedom."""
    usable = cells.usable
    numbers = sorted({row["cell"] for row in usable})
    if len(numbers) - 1 < 1 + len(LAWS[law]) + MIN_DOF:
        return {}
    comparisons = []
    for number in tqdm(numbers, "settings held out", disable=None, leave=False):
        others = MeasuredCells([row for row in usable if row["cell"] != number], level=cells.level)
        fitted = _fit_cells(law, others, n_draws=CV_DRAWS)
        unseen = [row for row in usable if row["cell"] == number]
        best = min(unseen, key=lambda row: row["floor"])
        for row in unseen:
            # The loss law is for the best batch size: minimum losses of others do not test it.
            tested = row if row is best else {k: v for k, v in row.items() if k != "floor"}
            comparisons.append(compare(_predict(fitted, row), tested))
    return summarize("leave-one-cell-out", comparisons)
