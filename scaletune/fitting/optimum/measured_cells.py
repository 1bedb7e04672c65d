"""Cells with their optima, and the runs and cells that are not used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.known_laws import LEVEL
from scaletune.fitting.optimum.cells import add_optima, choose_batches, split_cells
from scaletune.fitting.table import tabulate

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
    return [cell_record(row) for row in measure_cells(table).rows]


def measure_cells(
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
    usable = {id(row) for row in cells.usable}
    for row in cells.rows:
        if id(row) not in usable:
            cells.dropped |= dict.fromkeys(row["ids"], row["status"])
    return cells


def require_usable(cells: MeasuredCells) -> None:
    if not cells.usable:
        reasons = [row["status"] for row in cells.rows]
        more = "; ..." if len(reasons) > 6 else ""
        raise UserError(
            f"a fit needs at least one usable setting, but {'; '.join(reasons[:6])}{more}"
        )


def best_batches(usable: list[Row]) -> list[Row]:
    """Each cell at the batch size with the lowest minimum loss."""
    best: dict[int, Row] = {}
    for row in usable:
        if row["cell"] not in best or row["floor"] < best[row["cell"]]["floor"]:
            best[row["cell"]] = row
    return [best[cell] for cell in sorted(best)]


def cell_record(row: Row) -> Row:
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
