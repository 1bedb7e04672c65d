"""Compares predictions of a law with settings that it was not fitted to."""

from __future__ import annotations

import math
from typing import Any

from scaletune.fitting.optimum.lr_basin import Basin
from scaletune.predicting import Prediction


def compare(prediction: Prediction, cell: dict[str, Any]) -> dict[str, Any]:
    """Compares a prediction with a measured setting.

    Args:
        prediction: The prediction for the setting.
        cell: The setting: a row of `Fit.cells` or of `measure`.

    Returns:
        A dict. `ratio`: predicted lr over measured lr. `excess`: loss of the setting's fitted basin
        at the predicted lr over its minimum loss, minus 1. `excess_grid`: mean loss at the trained
        lr nearest to the prediction over the lowest mean loss, minus 1. `covered`: whether the
        prediction interval, widened by the standard error of the measurement, contains the measured
        optimum. `in_band`: whether the predicted lr is in the near-optimal band. The same for the
        loss: `loss_ratio`, `loss_covered`. If the optimum could not be measured (`status` says
        why), only `excess_grid` has a value.
    """
    row: dict[str, Any] = {key: cell[key] for key in ("n_params", "tokens", "status")}
    row |= {
        "predicted_lr": prediction.lr,
        "measured_lr": None,
        "ratio": None,
        "excess": None,
        "covered": None,
        "in_band": None,
    }
    row |= _compare_grid(prediction, cell)
    if cell["status"] == "ok" and prediction.lr is not None:
        row |= _compare_basin(prediction, cell)
    if "floor" in cell:
        row |= _compare_loss(prediction, cell["floor"], cell["floor_se"])
    return row


def _compare_grid(prediction: Prediction, cell: dict[str, Any]) -> dict[str, Any]:
    grid = cell.get("grid", {"lr": [], "loss": []})
    if not grid["lr"] or prediction.lr is None:
        return {"nearest_lr": None, "excess_grid": None}
    distance = [abs(math.log(lr / prediction.lr)) for lr in grid["lr"]]
    nearest = distance.index(min(distance))
    return {
        "nearest_lr": grid["lr"][nearest],
        "excess_grid": grid["loss"][nearest] / min(grid["loss"]) - 1,
    }


def _compare_basin(prediction: Prediction, cell: dict[str, Any]) -> dict[str, Any]:
    assert prediction.lr is not None
    offset = math.log(prediction.lr) - cell["x"]
    measured = math.exp(cell["x"])
    return {
        "measured_lr": measured,
        "ratio": math.exp(offset),
        "excess": float(Basin(**cell["basin"])(prediction.lr)) / cell["basin"]["floor"] - 1,
        "covered": covers(prediction.interval.get("lr"), prediction.lr, measured, cell["se"]),
        "in_band": -cell["half_width"][0] <= offset <= cell["half_width"][1],
    }


def _compare_loss(prediction: Prediction, minimum: float, se: float) -> dict[str, Any]:
    """Compares the predicted loss with the measured minimum loss, both in nats/token."""
    predicted = prediction.loss
    return {
        "predicted_loss": predicted,
        "measured_loss": minimum,
        "loss_ratio": None if predicted is None else predicted / minimum,
        "loss_covered": None
        if predicted is None
        else covers(prediction.interval.get("loss"), predicted, minimum, se / minimum),
    }


def covers(
    interval: list[float] | None, predicted: float, measured: float, se: float
) -> bool | None:
    """Whether an interval, widened by the standard error of ln `measured`, contains `measured`.

    The half-width of the interval and 1.96 standard errors add in squares, in logs.
    """
    if interval is None:
        return None
    half = abs(math.log(max(interval[1 if measured > predicted else 0], 1e-300) / predicted))
    return abs(math.log(measured / predicted)) <= math.hypot(half, 1.96 * se)


def summarize(kind: str, rows: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """The content of `Fit.held_out`: compared settings, excess losses and share of covered ones."""

    def values(key: str) -> list[float]:
        return sorted(float(row[key]) for row in rows if row.get(key) is not None)

    def median(ordered: list[float]) -> float | None:
        if not ordered:
            return None
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    def share(key: str) -> float | None:
        flags = values(key)
        return sum(flags) / len(flags) if flags else None

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
