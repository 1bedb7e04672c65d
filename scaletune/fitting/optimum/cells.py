"""From a table of runs to one row per cell: its losses along the lr axis and its optimum.

Runs and cells that cannot be used get a reason.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from scaletune.fitting.optimum.lr_basin import estimate_noise, locate
from scaletune.fitting.table import status_reasons
from scaletune.surface.basin import REACH
from scaletune.units import human

SLOW = 0.5  # seconds after which progress is shown
# If the lowest loss is at the end of the lr grid, the standard error of the optimum in grid steps.
EDGE_STEPS = 2
# Noise is estimated from points within this fraction above the lowest: higher ones are noisier.
NEAR_MINIMUM = 0.03
READ = (  # columns that are read here: a group of few columns is taken faster
    *("n_params", "tokens", "batch_tokens", "lr", "loss", "seed", "status", "message", "id"),
    *("cell", "crossed"),
)


def split_cells(table: pd.DataFrame) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per (cell, batch size), and {id: reason} of the runs that are not used.

    `points` holds the losses along lr if they can be fitted; `status` says why if they cannot.
    """
    rows: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    table = table[[column for column in READ if column in table]]
    groups = table.groupby(["cell", "batch_tokens"], dropna=False, sort=True)
    for _, group in tqdm(
        groups, "settings read", groups.ngroups, delay=SLOW, disable=None, leave=False
    ):
        kept, reasons = _usable_runs(group)
        dropped |= reasons
        row = _cell_row(group, kept) | {"cell": int(group["cell"].iloc[0]), "ids": list(kept["id"])}
        enough = len(row["grid"]["lr"]) >= 3
        row["points"], outside = _fitted_points(kept) if enough else ({}, {})
        dropped |= outside
        row["ids"] = [i for i in row["ids"] if i not in outside]
        rows.append(row)
    return rows, dropped


def cell_name(row: dict[str, Any]) -> str:
    """A cell in words, for messages."""
    batch = row["batch_tokens"]
    at_batch = f" at batch size {human(batch)}" if batch is not None else ""
    return (
        f"the setting with {human(row['n_params'])} parameters and {human(row['tokens'])} tokens"
        + at_batch
    )


def _usable_runs(group: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Runs at learning rates where no run diverged: the survivors would be a biased sample."""
    if (group["status"] == "done").all():
        return group, {}
    diverged = group.loc[group["status"] == "diverged", "lr"]
    survivors = group[(group["status"] == "done") & group["lr"].isin(diverged)]
    reasons = status_reasons(group)
    reasons |= dict.fromkeys(survivors["id"], "another run at this lr diverged")
    return group[~group["id"].isin(reasons)], reasons


def _cell_row(group: pd.DataFrame, kept: pd.DataFrame) -> dict[str, Any]:
    """The scale of a cell, its mean loss at every usable lr, and its status."""
    batch = group["batch_tokens"].iloc[0]
    by_lr = kept.groupby("lr")["loss"]
    mean = by_lr.mean()
    row: dict[str, Any] = {
        "n_params": float(group["n_params"].median()),
        "tokens": float(group["tokens"].median()),
        "batch_tokens": None if np.isnan(batch) else float(batch),
        "grid": {
            "lr": [float(v) for v in mean.index],
            "loss": [float(v) for v in mean],
            "n": [int(v) for v in by_lr.size()],
        },
    }
    return row | {"status": _optimum_status(row, mean, group)}


def _optimum_status(row: dict[str, Any], mean: pd.Series, group: pd.DataFrame) -> str:
    """ "ok", or a sentence that says why the cell has no optimum inside its grid."""
    if mean.empty:
        diverged = int((group["status"] == "diverged").sum())
        action = "add lower learning rates" if diverged else "train the other runs to their end"
        return f"{cell_name(row)} has no usable run: {diverged} of {len(group)} diverged; {action}"
    if len(mean) < 3:
        return (
            f"{cell_name(row)} has {len(mean)} usable learning rates, but an optimum needs 3; "
            "add learning rates"
        )
    best = int(np.argmin(mean.to_numpy()))
    if 0 < best < len(mean) - 1:
        return "ok"
    lr = float(mean.index[best])
    end, side, direction = (
        ("lowest", "below", "lower") if best == 0 else ("highest", "above", "higher")
    )
    beyond = group.loc[group["lr"] < lr if best == 0 else group["lr"] > lr, "lr"]
    if not len(beyond):
        usable, why, action = "", "", f"add {direction} learning rates"
    else:
        nearest = beyond.min() if best else beyond.max()
        next_lr = f"{nearest:.3g}"
        usable, why = " usable", f"; the next lr {side} it, {next_lr}, diverged or failed"
        action = f"add learning rates between {lr:.3g} and {next_lr}"
        if (group.loc[group["lr"] == nearest, "status"] == "stopped").any():
            why = f"; the next lr {side} it, {next_lr}, was stopped early"
            action = "train it to its end"
    return (
        f"{cell_name(row)} has its lowest loss at the {end}{usable} lr of its grid, {lr:.3g}{why}: "
        f"the optimum may be {side} it, so the setting is not used; {action}"
    )


def _fitted_points(kept: pd.DataFrame) -> tuple[dict[str, Any], dict[str, str]]:
    """The points that the basin is fitted to, and {id: reason} of runs with too high a loss."""
    row = np.unique(kept["lr"], return_inverse=True)[1]
    mean = np.bincount(row, kept["loss"]) / np.bincount(row)
    best = int(np.argmin(mean))
    inside = mean <= (1 + REACH) * mean.min()
    inside[max(best - 1, 0) : best + 2] = True
    reason = (
        f"more than {REACH:.0%} above the lowest loss of its setting: outside the fitted part of "
        "the loss basin"
    )
    outside = dict.fromkeys(kept["id"][~inside[row]], reason)
    return _lr_effects(kept[inside[row]]), outside


def _lr_effects(runs: pd.DataFrame) -> dict[str, Any]:
    """Fits loss = effect of lr + effect of seed + noise by least squares.

    The effect of the seed is included only if the same seeds were used across learning rates.
    `ss` and `dof` are the sum of squares of the residuals and its degrees of freedom; `shared` is
    the variance of the effect of the seed.
    """
    lrs, row = np.unique(runs["lr"], return_inverse=True)
    seeds, column = np.unique(runs["seed"], return_inverse=True)
    loss = runs["loss"].to_numpy(float)
    design, rank = np.eye(len(lrs))[row], len(lrs) + len(seeds) - 1
    crossed = bool(runs["crossed"].iloc[0]) and len(seeds) > 1 and len(runs) >= rank
    if crossed:  # a seed per run would make a matrix of runs * runs
        both = np.hstack([design, np.eye(len(seeds))[column] - 1 / len(seeds)])
        crossed = bool(np.linalg.matrix_rank(both) == rank)
        design = both if crossed else design
    if not crossed:
        rank = len(lrs)
    effect = np.linalg.lstsq(design, loss, rcond=None)[0]
    residuals, y = loss - design @ effect, effect[: len(lrs)]
    near = y[row] <= (1 + NEAR_MINIMUM) * y.min()
    return {
        "x": np.log(lrs),
        "y": y,
        "n": np.bincount(row).astype(float),
        "ss": float(residuals[near] @ residuals[near]),
        "dof": int((len(runs) - rank) * near.mean()),
        "shared": float(np.var(effect[len(lrs) :], ddof=1)) if crossed else None,
        "seeds": len(seeds) if crossed else 1,
    }


def add_optima(
    rows: list[dict[str, Any]], noise: tuple[float, int] | None = None, level: float = 0.95
) -> tuple[float, int]:
    """Adds the optimum to every row that has one, in place; returns (noise variance, its dof).

    If no row has an optimum inside its grid, rows whose lowest loss is at the end of the grid get
    that end with a large standard error: a bound on the optimum.
    """
    usable = [row for row in rows if row["status"] == "ok"]
    edges = [] if usable else [row for row in rows if row["points"]]
    if not usable and not edges:
        return noise or (0.0, 0)
    points = [row["points"] for row in usable or edges]
    variance, dof = noise or estimate_noise(points)
    # Pooled over cells: two seeds of one cell say little about the variance between seeds.
    known = [point["shared"] for point in points if point["shared"] is not None]
    shared = float(np.mean(known)) if known else 0.0
    for row, point in tqdm(
        zip(usable or edges, points, strict=True),
        "settings measured",
        len(points),
        delay=SLOW,
        disable=None,
        leave=False,
    ):
        optimum = locate(point, variance, dof, level)
        if optimum is None:
            row["status"] = cell_name(row) + NO_MINIMUM
            continue
        row |= optimum
        row["floor_se"] = math.hypot(row["floor_se"], math.sqrt(shared / point["seeds"]))
    for row in edges:
        row |= _edge_optimum(row) if "x" in row else {}
    return variance, dof


NO_MINIMUM = (
    " has no minimum along the learning rate: its losses are higher in the middle of the grid than"
    " at the ends, as if runs there did not finish; look at them, or leave them out with --where"
)


def _edge_optimum(row: dict[str, Any]) -> dict[str, Any]:
    """The bound on the optimum of a cell whose lowest loss is at the end of its lr grid."""
    lrs, losses = row["grid"]["lr"], row["grid"]["loss"]
    best = losses.index(min(losses))
    x, se = math.log(lrs[best]), EDGE_STEPS * math.log(lrs[-1] / lrs[0]) / (len(lrs) - 1)
    # The decrease over the last grid step: the next step may lower the loss as much.
    drop = losses[1 if best == 0 else best - 1] - losses[best]
    interval = [math.exp(x - 1.96 * se), math.exp(x + 1.96 * se)]
    return {
        "x": x,
        "se": se,
        "interval": interval,
        "floor": losses[best],
        "floor_se": math.hypot(drop, row["floor_se"]),
    }


def choose_batches(
    rows: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """The batch size with the lowest minimum loss in each cell.

    Returns the chosen rows, {id: reason} of the runs at other batch sizes, and warnings.
    """
    chosen: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    warnings: list[str] = []
    if len({row["cell"] for row in rows}) < len(rows):
        warnings = [
            "settings were trained at several batch sizes: the law uses the batch size with the "
            "lowest loss in each setting, so lr is for the best batch size"
        ]
    by_cell: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault(row["cell"], []).append(row)
    for _, here in sorted(by_cell.items()):
        usable = [row for row in here if row["status"] == "ok"]
        best = min(usable, key=lambda row: row["floor"]) if usable else here[0]
        chosen.append(best)
        for row in here:
            if row is not best:
                reason = "another batch size of this setting is used"
                dropped |= dict.fromkeys(row["ids"], reason)
            lowest = min(row["grid"]["loss"], default=np.inf)
            if row["status"] != "ok" and usable and lowest < best["floor"]:
                warnings.append(
                    f"{row['status']} (its loss is below that of the batch size used, "
                    f"{human(best['batch_tokens'])})"
                )
    return chosen, dropped, warnings
