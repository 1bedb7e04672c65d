"""How well a law predicts a cell it has not seen: predicted first, measured after."""

from __future__ import annotations

import math
from typing import Any

from scaletune.fitting.optimum.lr_basin import Basin
from scaletune.predicting import Prediction


def compare(prediction: Prediction, cell: dict[str, Any]) -> dict[str, Any]:
    """A prediction against a measured cell (a row of `Fit.cells` or `measure`).

    `ratio` is predicted lr over measured; `excess` the cell's fitted basin at the predicted lr over its floor, minus 1;
    `excess_grid` the mean loss of the trained lr nearest to it over the lowest mean, minus 1; `covered` whether the
    prediction's interval, widened by the measurement's own, holds the measured optimum. A cell whose optimum could not
    be measured (its `status` says why) gives only `excess_grid`.
    """
    out: dict[str, Any] = {key: cell[key] for key in ("n_params", "tokens", "status")}
    out |= {
        "predicted_lr": prediction.lr,
        "measured_lr": None,
        "ratio": None,
        "excess": None,
        "covered": None,
        "in_band": None,
    }
    out |= _against_grid(prediction, cell)
    if cell["status"] == "ok" and prediction.lr is not None:
        out |= _against_basin(prediction, cell)
    if "floor" in cell:
        out |= _loss(prediction, cell["floor"], cell["floor_se"])
    return out


def _against_grid(prediction: Prediction, cell: dict[str, Any]) -> dict[str, Any]:
    grid = cell.get("grid", {"lr": [], "loss": []})
    if not grid["lr"] or prediction.lr is None:
        return {"nearest_lr": None, "excess_grid": None}
    distance = [abs(math.log(lr / prediction.lr)) for lr in grid["lr"]]
    nearest = distance.index(min(distance))
    return {
        "nearest_lr": grid["lr"][nearest],
        "excess_grid": grid["loss"][nearest] / min(grid["loss"]) - 1,
    }


def _against_basin(prediction: Prediction, cell: dict[str, Any]) -> dict[str, Any]:
    assert prediction.lr is not None
    offset = math.log(prediction.lr) - cell["x"]
    return {
        "measured_lr": math.exp(cell["x"]),
        "ratio": math.exp(offset),
        "excess": float(Basin(**cell["basin"])(prediction.lr)) / cell["basin"]["floor"] - 1,
        "covered": covers(
            prediction.interval.get("lr"), prediction.lr, math.exp(cell["x"]), cell["se"]
        ),
        "in_band": -cell["half_width"][0] <= offset <= cell["half_width"][1],
    }


def _loss(prediction: Prediction, floor: float, floor_se: float) -> dict[str, Any]:
    """Predicted loss against the floor, nats/token."""
    if prediction.loss is None:
        return {
            "predicted_loss": None,
            "measured_loss": floor,
            "loss_ratio": None,
            "loss_covered": None,
        }
    covered = covers(prediction.interval.get("loss"), prediction.loss, floor, floor_se / floor)
    return {
        "predicted_loss": prediction.loss,
        "measured_loss": floor,
        "loss_ratio": prediction.loss / floor,
        "loss_covered": covered,
    }


def covers(
    interval: list[float] | None, predicted: float, measured: float, se: float
) -> bool | None:
    """Whether `measured`, known to `se` in its log, is inside: both errors add in squares, in logs."""
    if interval is None:
        return None
    half = abs(math.log(max(interval[1 if measured > predicted else 0], 1e-300) / predicted))
    return abs(math.log(measured / predicted)) <= math.hypot(half, 1.96 * se)


def summary(kind: str, rows: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """What `Fit.held_out` holds: the cells, the worst and median excess loss, and the share of cells covered."""

    def values(key: str) -> list[float]:
        return sorted(float(row[key]) for row in rows if row.get(key) is not None)

    def median(found: list[float]) -> float | None:
        return (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2 if found else None

    def share(key: str) -> float | None:
        found = values(key)
        return sum(found) / len(found) if found else None

    excess = values("excess")
    return {
        "kind": kind,
        "cells": rows,
        "worst_excess": excess[-1] if excess else None,
        "median_excess": median(excess),
        "worst_excess_grid": max(values("excess_grid"), default=None),
        "coverage": share("covered"),
        "worst_loss_error": max((abs(value - 1) for value in values("loss_ratio")), default=None),
        "loss_coverage": share("loss_covered"),
        **others,
    }
