"""`fit`: trials in, a `Fit` out. The parts are in the files beside this one; here is the order they go in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from scaletune.errors import UserError, nearest
from scaletune.fitting.cross_validation import compare, summary
from scaletune.fitting.joint.fit import fit_joint, hold_out
from scaletune.fitting.loss.law import ESTIMATORS
from scaletune.fitting.loss.record import fit_loss_law
from scaletune.fitting.loss.tuned_runs import fit_rows, prepare
from scaletune.fitting.optimum.cells import best_slices, optima, slices
from scaletune.fitting.optimum.lr_basin import BAND, MISFIT
from scaletune.fitting.optimum.power_law import fit_power_law
from scaletune.fitting.relations import RELATIONS, fit_relation
from scaletune.fitting.shared_settings import common_setting, differing, setting_sentences
from scaletune.fitting.table import held_out_cells, main_sweep, odd_units, tabulate
from scaletune.importing import trials as records_of
from scaletune.predicting import LOSS_LAWS, Prediction, from_fit
from scaletune.records import Fit

LAWS = {
    "lr_nd": ("n_params", "tokens"),  # lr = c * n_params**a * tokens**b
    "lr_ndb": (
        "n_params",
        "tokens",
        "batch_tokens",
    ),  # lr = c * n_params**a * tokens**b * batch_tokens**d
    "loss_nd": (
        "n_params",
        "tokens",
    ),  # E + A / n_params**alpha + B / tokens**beta, as predicts best one size up
    "chinchilla": ("n_params", "tokens"),  # the same form by its published objective
    "joint": (
        "n_params",
        "tokens",
        "batch_tokens",
    ),  # loss over lr and batch at every scale: surface.py
}
LEVEL = 0.95  # of every interval
SPARE = 1  # degrees of freedom a law must keep when one cell is left out
QUICK = 100  # resamples of the loss law in a fit that only judges one cell

Row = dict[str, Any]


@dataclass
class Measured:
    """Cells with their optima, the runs left out, and what there is to say."""

    rows: list[Row]
    dropped: dict[str, str] = field(default_factory=dict)  # id -> reason
    said: list[str] = field(default_factory=list)
    noise: tuple[float, int] = (0.0, 0)  # variance of one run's loss, and its degrees of freedom
    level: float = LEVEL
    choice: list[str] = field(
        default_factory=list
    )  # what to say when cells had several batch sizes to choose among

    @property
    def usable(self) -> list[Row]:
        """Cells with an optimum; when no cell has one inside its grid, those that bound it."""
        return [row for row in self.rows if row["status"] == "ok"] or [
            row for row in self.rows if "x" in row
        ]


def fit(
    trials: pd.DataFrame | str | Path, law: str = "lr_nd", *, holdout: str | None = None,
    fixed: Mapping[str, float | str] | None = None, level: float = LEVEL,
) -> Fit:  # fmt: skip
    """Fit `law` to runs with columns n_params, tokens, lr, loss (and batch_tokens, seed, status, id when there are any), or to a file of them.

    A file may be whatever `importing.trials` reads. A law of RELATIONS has columns of its own: `RELATIONS[law].inputs` and `.output`.
    `holdout`, e.g. ``"n_params > 5e6"``, takes whole cells out to judge the law on; without it cells are left out one at
    a time. `fixed` holds parameters of a loss law at a value, or ties an exponent to another: ``{"E": 1.69, "beta": "alpha"}``.
    `level` is that of every interval.
    A quantity the runs cannot give is a sentence in `Fit.status`. UserError when no cell is usable at all.
    """
    known_law(law)
    if not 0 < level < 1:
        raise UserError(f"`0 < level < 1` must hold, but got {level!r}")
    trials, guessed = (
        (trials, list[str]()) if isinstance(trials, pd.DataFrame) else records_of(trials)
    )
    made = _fitted(trials, law, holdout, fixed, level)
    return replace(made, assumptions=[*made.assumptions, *guessed])


def _fitted(
    trials: pd.DataFrame,
    law: str,
    holdout: str | None,
    fixed: Mapping[str, float | str] | None,
    level: float,
) -> Fit:
    trials, others = main_sweep(trials)
    if law in RELATIONS:
        if holdout or fixed:
            raise UserError(
                f"a hold-out and fixed parameters are for laws of n_params and tokens, but got law={law!r}"
            )
        return fit_relation(trials, RELATIONS[law], level=level)
    if law in LOSS_LAWS and not _has_lr_axis(prepare(trials)[0]):
        return fit_rows(trials, law, holdout, fixed, level)
    if fixed:
        raise UserError(
            f"fixed parameters are for a loss law of runs without an lr axis, but got {', '.join(fixed)} for {law!r}"
        )
    table = tabulate(trials, [*LAWS[law], "lr", "loss"])
    held = table["cell"].isin(held_out_cells(table, holdout) if holdout else ())
    if law == "joint":
        result = _finish(
            fit_joint(table[~held], _mixed(table[~held]), level), trials, table, others, holdout
        )
        return replace(result, held_out=hold_out(result, table[~held], table[held], holdout))
    found = _measure(table[~held], every_batch=law == "lr_ndb", level=level)
    if not found.usable:
        reasons = [row["status"] for row in found.rows]
        raise UserError(
            f"a fit needs at least one usable cell, but {'; '.join(reasons[:6])}{'; ...' if len(reasons) > 6 else ''}"
        )
    law, said = _settle(law, found)
    result = _finish(
        _assemble(law, found, said + _mixed(table[~held])), trials, table, others, holdout
    )
    if not holdout:
        return replace(result, held_out=_leave_one_out(law, found))
    rows = _measure(table[held], every_batch=law == "lr_ndb", noise=found.noise, level=level).rows
    judged = [compare(_predict(result, row), row) for row in rows]
    return replace(
        result, held_out=summary(f"hold-out: {holdout}", judged, runs=list(table.loc[held, "id"]))
    )


def _finish(
    result: Fit,
    trials: pd.DataFrame,
    table: pd.DataFrame,
    others: dict[str, str],
    holdout: str | None,
) -> Fit:
    """`result` with what the records say of their runs: shapes, setting, and those of other sweeps."""
    setting = common_setting(trials)
    return replace(
        result,
        ranges=result.ranges | _shape_ranges(table),
        dropped=result.dropped | others,
        provenance=result.provenance
        | {"trials": len(trials), "holdout": holdout, "setting": setting},
        assumptions=[*setting_sentences(setting), *result.assumptions],
    )


def known_law(law: str) -> None:
    """UserError, with the nearest name, unless `law` is one that `fit` fits."""
    if law not in LAWS and law not in RELATIONS:
        raise UserError(
            f"a law must be one that can be fitted, but got {law!r}{nearest(law, [*LAWS, *RELATIONS])}"
        )


def measure(trials: pd.DataFrame) -> list[Row]:
    """The optimum of every (n_params, tokens) cell with its interval, floor, basin and near-optimal band; `status` says why one has none."""
    return [
        _public(row)
        for row in _measure(tabulate(trials, ["n_params", "tokens", "lr", "loss"])).rows
    ]


def _has_lr_axis(trials: pd.DataFrame) -> bool:
    """Whether losses are floors of basins: some cell was trained at three learning rates or more."""
    if "lr" not in trials.columns or not len(trials):
        return False
    table = tabulate(trials, ["n_params", "tokens", "loss"])
    return bool((table.groupby("cell")["lr"].nunique() >= 3).any())


def _measure(
    table: pd.DataFrame,
    *,
    every_batch: bool = False,
    noise: tuple[float, int] | None = None,
    level: float = LEVEL,
) -> Measured:
    """The optimum of each cell; at its best batch size unless `every_batch`; with its own noise unless `noise`."""
    rows, dropped = slices(table)
    found = Measured(rows, dropped, noise=optima(rows, noise, level), level=level)
    if not every_batch:
        found.rows, others, found.choice = best_slices(rows)
        found.dropped |= others
    found.said = [row["status"] for row in found.rows if row["status"] != "ok"]
    if found.usable and found.usable[0]["status"] != "ok":
        found.said.insert(
            0,
            "no cell has its optimum inside its lr grid: the law goes through the grids' ends and is a bound, not an optimum",
        )
    for row in found.rows:
        if row not in found.usable:
            found.dropped |= dict.fromkeys(row["ids"], row["status"])
    return found


def _settle(law: str, found: Measured) -> tuple[str, list[str]]:
    """The law that can be fitted here, and what to say of batch sizes that were chosen among or that differ between cells."""
    batches = {row["batch_tokens"] for row in found.usable}
    if law == "lr_ndb" and None in batches:
        raise UserError("law 'lr_ndb' needs `batch_tokens` in every trial, but some have none")
    if found.choice:
        return law, found.choice
    if law == "lr_nd" and len(batches) > 1 and None not in batches:
        return "lr_ndb", [
            "batch_tokens differs between cells, so the law has a batch exponent: lr_ndb"
        ]
    return law, []


def _mixed(table: pd.DataFrame) -> list[str]:
    """A sentence for each setting that differs between runs of one cell and batch size, which the fit does not see, and for odd units."""
    groups = table.groupby(["cell", "batch_tokens", "lr"], dropna=False)
    mixed = [
        c
        for c in ("sweep", "width", "depth", "seq_len", "weight_decay")
        if c in table.columns and (groups[c].nunique() > 1).any()
    ]
    averaged = [
        f"`{column}` differs between runs of the same cell and lr: they are averaged as if it did not"
        for column in mixed
    ]
    own = [
        f"`{name}` differs between runs of one cell: its optimum is read off runs that are not alike"
        for name in differing(table)
    ]
    return [*odd_units(table), *averaged, *own]


def _assemble(
    law: str, found: Measured, said: Sequence[str] = (), n_draws: int | None = None
) -> Fit:
    """The record of a law fitted to cells with optima."""
    usable = found.usable
    shared: dict[str, Any] = {
        "used": [i for row in usable for i in row["ids"]],
        "level": found.level,
    }
    lower = law if law in LOSS_LAWS else "loss_nd"
    loss = _record(
        lower,
        _loss_law(usable, lower, n_draws, found.level),
        ranges=_ranges(usable, lower),
        **shared,
    )
    shared |= {
        "cells": [_public(row) for row in found.rows],
        "dropped": found.dropped,
        "assumptions": _assumptions(),
        "provenance": {"noise_sd": float(np.sqrt(found.noise[0])), "noise_dof": found.noise[1]},
    }
    if law in LOSS_LAWS:
        floors = [[row["n_params"], row["tokens"], row["floor"]] for row in _lowest(usable)]
        loss = replace(loss, solution=loss.solution | {"points": floors})
        said = [*found.said, *said, *(sentence for sentence in loss.status if sentence != "ok")]
        return replace(loss, status=said or ["ok"], **shared)
    part = fit_power_law(usable, list(LAWS[law]), found.level)
    part["solution"]["batch_tokens"] = sorted(
        {row["batch_tokens"] for row in usable if row["batch_tokens"] is not None}
    )
    return _record(
        law, part, [*found.said, *said], ranges=_ranges(usable, law), loss_law=loss, **shared
    )


def _record(law: str, part: dict[str, Any], said: Sequence[str] = (), **fields: Any) -> Fit:
    status = [*said, *part["said"]]
    return Fit(
        law=law,
        params=part["params"],
        solution=part["solution"],
        objective=part["objective"],
        status=status or ["ok"],
        **fields,
    )


def _assumptions() -> list[str]:
    return [
        "loss against ln lr is floor + curvature * (exp(s t) - 1 - s t) / s**2, right to "
        f"{MISFIT:.0%} of the height above the floor; s is fitted with a prior from public sweeps",
        f"the near-optimal band is where the fitted loss is within {BAND:.2%} of the floor",
        "cells deviate from the law as independent normals in ln lr, targets no more than the cells fitted",
    ]


def _loss_law(usable: list[Row], law: str, n_draws: int | None, level: float) -> dict[str, Any]:
    """The loss law through each cell's lowest floor."""
    lowest = _lowest(usable)
    n_params, tokens, floor, se = (
        np.array([row[key] for row in lowest])
        for key in ("n_params", "tokens", "floor", "floor_se")
    )
    return fit_loss_law(
        n_params, tokens, floor, se, level=level, n_draws=n_draws, estimator=ESTIMATORS[law]
    )


def _lowest(usable: list[Row]) -> list[Row]:
    """Each cell at the batch of its lowest floor."""
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
    """Depths and widths of the runs, when the records say: what a target beyond them has to assume."""
    return {
        column: [float(table[column].min()), float(table[column].max())]
        for column in ("width", "depth")
        if column in table
    }


def _public(row: Row) -> Row:
    """A cell as the record keeps it: plain numbers, and learning rates beside their logs."""
    out = {key: value for key, value in row.items() if key not in ("points", "ids", "cell")} | {
        "n_runs": len(row["ids"])
    }
    if "x" in row:
        out["lr"] = float(np.exp(row["x"]))
        out["band"] = [
            float(np.exp(row["x"] + sign * width))
            for sign, width in zip((-1, 1), row["half_width"], strict=True)
        ]
    return out


def _predict(result: Fit, row: Row) -> Prediction:
    batch = row["batch_tokens"] if result.law == "lr_ndb" else None
    return from_fit(result, n_params=row["n_params"], tokens=row["tokens"], batch_tokens=batch)


def _leave_one_out(law: str, found: Measured) -> dict[str, Any]:
    """Each cell predicted from the others, when they still leave the law a degree of freedom; empty otherwise."""
    usable = found.usable
    cells = sorted({row["cell"] for row in usable})
    if len(cells) - 1 < 1 + len(LAWS[law]) + SPARE:
        return {}
    judged = []
    for cell in tqdm(cells, "cells held out", disable=None, leave=False):
        without = _assemble(
            law,
            Measured([row for row in usable if row["cell"] != cell], level=found.level),
            n_draws=QUICK,
        )
        here = [row for row in usable if row["cell"] == cell]
        best = min(
            here, key=lambda row: row["floor"]
        )  # the loss law is that of the best batch size: the others' floors are no test of it
        judged += [
            compare(
                _predict(without, row),
                row if row is best else {k: v for k, v in row.items() if k != "floor"},
            )
            for row in here
        ]
    return summary("leave-one-cell-out", judged)
