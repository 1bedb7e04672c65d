"""Fits the power law of the optimal lr and the loss law to cells with optima, and tests both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from scaletune.fitting.cross_validation import compare, summarize
from scaletune.fitting.known_laws import LAWS
from scaletune.fitting.loss.law import ESTIMATORS
from scaletune.fitting.loss.record import fit_loss_law
from scaletune.fitting.optimum.lr_basin import BAND, MISFIT
from scaletune.fitting.optimum.measured_cells import (
    MeasuredCells,
    Row,
    best_batches,
    cell_record,
)
from scaletune.fitting.optimum.power_law import fit_power_law
from scaletune.predicting import LOSS_LAWS, Prediction, from_fit
from scaletune.records import Fit

MIN_DOF = 1  # degrees of freedom that a law keeps when one cell is left out
CV_DRAWS = 100  # resamples of the loss law in cross-validation
# Most and fewest refits of the cross-validation, and the cells of all refits together.
MOST_FOLDS, FEWEST_FOLDS, REFITTED_CELLS = 40, 5, 20_000


def fit_cells(
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
        "cells": [cell_record(row) for row in cells.rows],
        "dropped": cells.dropped,
        "assumptions": _assumptions(),
        "provenance": {"noise_sd": float(np.sqrt(cells.noise[0])), "noise_dof": cells.noise[1]},
    }
    warnings = [*cells.warnings, *warnings]
    if law in LOSS_LAWS:
        points = [[row["n_params"], row["tokens"], row["floor"]] for row in best_batches(usable)]
        status = list(dict.fromkeys([*loss_part["unmeasured"], *warnings, *loss.status]))
        status = [sentence for sentence in status if sentence != "ok"]
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
        status=[*part["unmeasured"], *warnings, *part["warnings"]] or ["ok"],
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
        "with fewer than 3 degrees of freedom, a between-setting scatter of 15 % is assumed as far "
        "as the settings do not tell it, and unclear exponents lean on published laws",
    ]


def _fit_minimum_losses(
    usable: list[Row], law: str, n_draws: int | None, level: float
) -> dict[str, Any]:
    """Fits the loss law to the minimum loss of each cell."""
    n_params, tokens, minimum, se = (
        np.array([row[key] for row in best_batches(usable)])
        for key in ("n_params", "tokens", "floor", "floor_se")
    )
    return fit_loss_law(
        n_params, tokens, minimum, se, level=level, n_draws=n_draws, estimator=ESTIMATORS[law]
    )


def _ranges(usable: list[Row], law: str) -> dict[str, list[float]]:
    return {
        column: [min(row[column] for row in usable), max(row[column] for row in usable)]
        for column in LAWS[law]
    }


def predict_cell(result: Fit, row: Row) -> Prediction:
    batch = row["batch_tokens"] if result.law == "lr_ndb" else None
    return from_fit(result, n_params=row["n_params"], tokens=row["tokens"], batch_tokens=batch)


def cross_validate(law: str, cells: MeasuredCells) -> dict[str, Any]:
    """Predicts each cell from the others; empty if the others leave no degree of freedom.

    With more than MOST_FOLDS cells, several are left out at once.
    """
    usable = cells.usable
    numbers = sorted({row["cell"] for row in usable})
    if len(numbers) - 1 < 1 + len(LAWS[law]) + MIN_DOF:
        return {}
    most = max(min(MOST_FOLDS, REFITTED_CELLS // len(numbers)), FEWEST_FOLDS)
    folds, comparisons = min(len(numbers), most), []
    for fold in tqdm(range(folds), "settings held out", disable=None, leave=False):
        held = set(numbers[fold::folds])
        others = [row for row in usable if row["cell"] not in held]
        fitted = fit_cells(law, MeasuredCells(others, level=cells.level), n_draws=CV_DRAWS)
        unseen = [row for row in usable if row["cell"] in held]
        best = {row["cell"]: row for row in best_batches(unseen)}
        for row in unseen:
            # The loss law is for the best batch size: minimum losses of others do not test it.
            is_best = row is best[row["cell"]]
            tested = row if is_best else {k: v for k, v in row.items() if k != "floor"}
            comparisons.append(compare(predict_cell(fitted, row), tested))
    several = "leave-one-cell-out" if folds == len(numbers) else f"cross-validation, {folds} folds"
    return summarize(several, comparisons)
