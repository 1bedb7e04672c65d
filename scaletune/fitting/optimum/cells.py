"""From a table of runs to one row a cell: its points along the lr axis, its optimum, and why any run or cell was left out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from scaletune.fitting.optimum.lr_basin import REACH, locate, noise_of

SLOW = 0.5  # seconds from which progress is shown
EDGE_STEPS = 2  # standard error, in steps of the lr grid, of an optimum known only to be at its end or beyond
NEAR = 0.03  # noise is measured on points within this share of the lowest: higher ones are noisier than the bottom is


def slices(table: pd.DataFrame) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per (cell, batch): `points` along lr when it can be fitted, else a status sentence; and {id: reason} of runs left out."""
    rows: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    groups = table.groupby(["cell", "batch_tokens"], dropna=False, sort=True)
    for _, group in tqdm(
        groups, "cells read", groups.ngroups, delay=SLOW, disable=None, leave=False
    ):
        kept, reasons = _usable(group)
        dropped |= reasons
        row = _describe(group, kept) | {"cell": int(group["cell"].iloc[0]), "ids": list(kept["id"])}
        row["points"], outside = _points(kept) if len(row["grid"]["lr"]) >= 3 else ({}, {})
        dropped |= outside
        row["ids"] = [i for i in row["ids"] if i not in outside]
        rows.append(row)
    return rows, dropped


def name(row: dict[str, Any]) -> str:
    """How a sentence calls a cell."""
    batch = f" at batch {row['batch_tokens']:g}" if row["batch_tokens"] is not None else ""
    return f"the cell of {row['n_params']:g} parameters and {row['tokens']:g} tokens{batch}"


def _usable(group: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Runs that finished, at learning rates where every seed did: survivors of an lr that diverges are a lucky sample."""
    failed, diverged = group[group["status"] == "failed"], group[group["status"] == "diverged"]
    lucky = group[(group["status"] == "done") & group["lr"].isin(diverged["lr"])]
    reasons = dict.fromkeys(failed["id"], "failed") | dict.fromkeys(diverged["id"], "diverged")
    reasons |= dict.fromkeys(lucky["id"], "another run at this lr diverged")
    return group[~group["id"].isin(reasons)], reasons


def _describe(group: pd.DataFrame, kept: pd.DataFrame) -> dict[str, Any]:
    """Scale of a slice, its mean loss at every usable lr, and whether an optimum can be read off it."""
    batch = group["batch_tokens"].iloc[0]
    mean = kept.groupby("lr")["loss"].mean()
    row: dict[str, Any] = {
        "n_params": float(group["n_params"].median()),
        "tokens": float(group["tokens"].median()),
        "batch_tokens": None if np.isnan(batch) else float(batch),
        "grid": {
            "lr": [float(v) for v in mean.index],
            "loss": [float(v) for v in mean],
            "n": [int(v) for v in kept.groupby("lr").size()],
        },
    }
    return row | {"status": _verdict(row, mean, group)}


def _verdict(row: dict[str, Any], mean: pd.Series, group: pd.DataFrame) -> str:
    """The word ok, or the sentence that says why this slice has no optimum to give."""
    if mean.empty:
        return f"{name(row)} has no usable run: {(group['status'] == 'diverged').sum()} of {len(group)} diverged"
    if len(mean) < 3:
        return f"{name(row)} has {len(mean)} usable learning rates, an optimum needs 3"
    best = int(np.argmin(mean.to_numpy()))
    if 0 < best < len(mean) - 1:
        return "ok"
    lr = float(mean.index[best])
    side, way = ("lowest", "below") if best == 0 else ("highest", "above")
    beyond = group.loc[group["lr"] < lr if best == 0 else group["lr"] > lr, "lr"]
    why = (
        f"; the next lr {way} it, {beyond.min() if best else beyond.max():.3g}, diverged"
        if len(beyond)
        else ""
    )
    usable = " usable" if len(beyond) else ""
    return f"{name(row)} has its lowest loss at the {side}{usable} lr of its grid, {lr:.3g}{why}: the optimum may lie {way} it and is not used"


def _points(kept: pd.DataFrame) -> tuple[dict[str, Any], dict[str, str]]:
    """Mean loss per lr with the seeds' common part removed, the replicates' sum of squares, and the runs too high to tell."""
    row = np.unique(kept["lr"], return_inverse=True)[1]
    mean = np.bincount(row, kept["loss"]) / np.bincount(row)
    best = int(np.argmin(mean))
    inside = mean <= (1 + REACH) * mean.min()
    inside[max(best - 1, 0) : best + 2] = True
    reason = (
        f"more than {REACH:.0%} above the lowest loss of its cell: outside the basin that is fitted"
    )
    outside = dict.fromkeys(kept["id"][~inside[row]], reason)
    return _additive(kept[inside[row]]), outside


def _additive(runs: pd.DataFrame) -> dict[str, Any]:
    """loss = lr's effect + seed's effect + noise by least squares; the seed's only when the same seeds run through the lrs."""
    lrs, row = np.unique(runs["lr"], return_inverse=True)
    seeds, column = np.unique(runs["seed"], return_inverse=True)
    loss = runs["loss"].to_numpy(float)
    of_lr = np.eye(len(lrs))[row]
    of_seed = np.eye(len(seeds))[column] - 1 / len(seeds)
    design, rank = np.hstack([of_lr, of_seed]), len(lrs) + len(seeds) - 1
    crossed = (
        bool(runs["crossed"].iloc[0]) and len(seeds) > 1 and np.linalg.matrix_rank(design) == rank
    )
    if not crossed:
        design, rank = of_lr, len(lrs)
    effect = np.linalg.lstsq(design, loss, rcond=None)[0]
    left, y = loss - design @ effect, effect[: len(lrs)]
    near = y[row] <= (1 + NEAR) * y.min()
    return {
        "x": np.log(lrs),
        "y": y,
        "n": np.bincount(row).astype(float),
        "ss": float(left[near] @ left[near]),
        "dof": int((len(runs) - rank) * near.mean()),
        "shared": float(np.var(effect[len(lrs) :], ddof=1))
        if crossed
        else None,  # variance of the seeds' common part
        "seeds": len(seeds) if crossed else 1,
    }


def optima(
    rows: list[dict[str, Any]], noise: tuple[float, int] | None = None, level: float = 0.95
) -> tuple[float, int]:
    """Add the optimum to every row that can give one (in place), with `noise` or their own; returns the noise used.

    When no row can, those whose lowest loss is on the edge of their grid get that edge, with an error to match: a bound, better than nothing.
    """
    usable = [row for row in rows if row["status"] == "ok"]
    edges = [] if usable else [row for row in rows if row["points"]]
    if not usable and not edges:
        return noise or (0.0, 0)
    points = [row["points"] for row in usable or edges]
    variance, dof = noise or noise_of(points)
    known = [point["shared"] for point in points if point["shared"] is not None]
    shared = (
        float(np.mean(known)) if known else 0.0
    )  # pooled: two seeds of one cell say little of how seeds vary
    for row, point in tqdm(
        zip(usable or edges, points, strict=True),
        "cells measured",
        len(points),
        delay=SLOW,
        disable=None,
        leave=False,
    ):
        row |= locate(point, variance, dof, level)
        row["floor_se"] = math.hypot(row["floor_se"], math.sqrt(shared / point["seeds"]))
    for row in edges:
        row |= _at_edge(row)
    return variance, dof


def _at_edge(row: dict[str, Any]) -> dict[str, Any]:
    """The optimum of a cell whose lowest loss is at the end of its grid: there, or some steps of the grid beyond."""
    lrs, losses = row["grid"]["lr"], row["grid"]["loss"]
    best = losses.index(min(losses))
    x, se = math.log(lrs[best]), EDGE_STEPS * math.log(lrs[-1] / lrs[0]) / (len(lrs) - 1)
    drop = (
        losses[1 if best == 0 else best - 1] - losses[best]
    )  # over the last step of the grid: the next may bring as much
    interval = [math.exp(x - 1.96 * se), math.exp(x + 1.96 * se)]
    return {
        "x": x,
        "se": se,
        "interval": interval,
        "floor": losses[best],
        "floor_se": math.hypot(drop, row["floor_se"]),
    }


def best_slices(
    rows: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Of a cell's batch sizes the one with the lowest floor; {id: reason} of the others, and what to say when there was a choice."""
    chosen: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    said: list[str] = []
    if len({row["cell"] for row in rows}) < len(rows):
        said = [
            "cells were trained at several batch sizes, each stands for the one with its lowest floor: lr is for a scale's best batch size"
        ]
    for cell in sorted({row["cell"] for row in rows}):
        here = [row for row in rows if row["cell"] == cell]
        usable = [row for row in here if row["status"] == "ok"]
        best = min(usable, key=lambda row: row["floor"]) if usable else here[0]
        chosen.append(best)
        for row in here:
            if row is not best:
                dropped |= dict.fromkeys(row["ids"], "another batch size of this cell is used")
            if (
                row["status"] != "ok"
                and usable
                and min(row["grid"]["loss"], default=np.inf) < best["floor"]
            ):
                said.append(
                    f"{row['status']}, though its loss is below that of the batch size used, {best['batch_tokens']:g}"
                )
    return chosen, dropped, said
