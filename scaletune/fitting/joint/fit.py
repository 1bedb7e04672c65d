"""Fits the law `joint`: from a checked table of runs to a `Fit` of the joint loss surface.

The `Fit` has the optimum of each cell (setting) by its own runs, and the result of predicting cells
that are held out. The surface and its estimation are in `scaletune.surface`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from scaletune.errors import UserError
from scaletune.fitting.cross_validation import covers, summarize
from scaletune.fitting.joint import diagnostics
from scaletune.fitting.optimum.lr_basin import BAND
from scaletune.fitting.table import status_reasons
from scaletune.predicting import Prediction, from_fit
from scaletune.records import Fit
from scaletune.surface.basin import REACH, basin_excess
from scaletune.surface.evaluation import AXES
from scaletune.surface.model import LAW, Scales, SurfaceRuns, law_basis, parameter_names
from scaletune.surface.posterior import JointSolution, solve
from scaletune.surface.prior import SCATTER_WEIGHT, fit_prior

COLUMNS = {"lr": "lr", "batch": "batch_tokens", "wd": "weight_decay"}
"""Axis of the surface -> column."""
LEAST = 5
"""Usable runs."""
ALONE = np.array([1.5, 1.5, 1.5, 0.5])
"""Scatter that leaves each cell its own optimum and minimum loss, independent of the law."""
FOLDS, REFITTED_RUNS = 20, 200_000
"""Largest number of refits of the cross-validation, and of the runs of all refits together."""
GROUPS = (*AXES, "loss", "curvature", "skew", "reach", "width")
PARTS = (".c", ".E", ".N", ".D", ".A", ".B")
"""Parameters are listed in the order of GROUPS, then of PARTS."""

Array = NDArray[np.float64]
Row = dict[str, Any]


def usable(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The runs that are fitted, and {id: reason} of the others."""
    dropped = status_reasons(table)
    kept = table[table["status"] == "done"]
    if (kept["loss"] <= 0).any():
        row = kept[kept["loss"] <= 0].iloc[0]
        raise UserError(
            "`loss` must be above 0 (the surface is fitted to ln loss), but run"
            f" {row['id']!r} has {row['loss']:g}"
        )
    same = [c for c in ("n_params", "tokens", *COLUMNS.values(), "loss") if c in kept] + (
        ["seed"] if kept["crossed"].all() else []
    )
    copies = kept.duplicated(same)
    dropped |= dict.fromkeys(kept["id"][copies], "a duplicate of another run")
    kept = kept[~copies]
    high = kept["loss"] > (1 + REACH) * kept.groupby("cell")["loss"].transform("min")
    reason = (
        f"more than {REACH:.0%} above the lowest loss of its setting: outside the fitted part of"
        " the loss basin"
    )
    dropped |= dict.fromkeys(kept["id"][high], reason)
    return kept[~high], dropped


def axes_of(kept: pd.DataFrame) -> list[str]:
    """lr and batch; also weight decay if a cell has three or more values of it."""
    if "weight_decay" not in kept:
        return ["lr", "batch"]
    if not (pd.to_numeric(kept["weight_decay"], errors="coerce") > 0).all():
        return ["lr", "batch"]
    return list(AXES[: 3 if (kept.groupby("cell")["weight_decay"].nunique() >= 3).any() else 2])


def gather(
    kept: pd.DataFrame, axes: Sequence[str], centre: tuple[float, float] | None = None
) -> tuple[SurfaceRuns, tuple[float, float]]:
    """The runs as arrays, and the mean ln n_params and ln tokens of their cells."""
    kept = kept.sort_values("cell", kind="stable")
    logs = np.log(
        kept[["n_params", "tokens", "loss", *(COLUMNS[axis] for axis in axes)]].to_numpy(float)
    )
    if centre is None:
        middle = np.log(kept.groupby("cell")[["n_params", "tokens"]].median()).mean()
        centre = (float(middle["n_params"]), float(middle["tokens"]))
    cell = np.unique(kept["cell"], return_inverse=True)[1]
    n, d = logs[:, 0] - centre[0], logs[:, 1] - centre[1]
    return SurfaceRuns(n, d, logs[:, 3:], logs[:, 2], cell), centre


def fit_joint(table: pd.DataFrame, warnings: Sequence[str], level: float) -> Fit:
    """Fits the joint surface.

    Args:
        table: Runs, from `tabulate`.
        warnings: The first sentences of the status.
        level: Coverage of the intervals.
    """
    kept, dropped = usable(table)
    if len(kept) < LEAST:
        reasons = "".join(f"; {reason}" for reason in sorted(set(dropped.values())))
        raise UserError(
            f"the joint surface needs at least {LEAST} usable runs, but got {len(kept)} of"
            f" {len(table)}{reasons}"
        )
    axes = axes_of(kept)
    runs, centre = gather(kept, axes)
    prior = fit_prior(runs)
    solution = solve(runs, prior)
    cells = own_optima(kept, axes, centre, solution, level)
    fit = record(solution, axes, centre, level)
    n_copies = sum(reason.startswith("a duplicate") for reason in dropped.values())
    unmeasured = diagnostics.not_measured(kept, cells)
    sentences = diagnostics.sentences(kept, axes, solution, prior, cells)
    status = list(dict.fromkeys([*unmeasured, *warnings, *sentences]))
    status += [f"{n_copies} runs are duplicates of others and are not used"] * (n_copies > 0)
    return replace(
        fit,
        solution=fit.solution | ({"unmeasured": {"sentences": unmeasured}} if unmeasured else {}),
        cells=cells,
        used=list(kept["id"]),
        dropped=dropped,
        status=status or ["ok"],
        assumptions=_assumptions(),
        ranges={
            column: [float(kept[column].min()), float(kept[column].max())]
            for column in ("n_params", "tokens", "batch_tokens")
        },
    )


def record(
    solution: JointSolution, axes: Sequence[str], centre: tuple[float, float], level: float
) -> Fit:
    """A Fit with what a prediction needs: vector, covariance, centre, scatter, quantile."""
    from scipy import stats

    dof = SCATTER_WEIGHT + max(len(solution.delta) - LAW, 0)
    quantile = float(stats.t.ppf(0.5 + level / 2, dof))
    values: dict[str, Any] = {
        "axes": list(axes),
        "names": parameter_names(len(axes)),
        "vector": [float(v) for v in solution.theta],
        # one line per parameter
        "covariance": [" ".join(f"{v:.12g}" for v in row) for row in solution.covariance],
        "centre": list(centre),
        "scatter": [float(v) for v in solution.scales.scatter],
        "noise": solution.scales.noise,
        "misfit": solution.scales.misfit,
        "dof": dof,
        "quantile": quantile,
        "band": BAND,
    }
    params = natural(solution, axes, centre, quantile)
    return Fit(
        law="joint", params=params, solution=values, objective=solution.objective, level=level
    )


def natural(
    solution: JointSolution, axes: Sequence[str], centre: tuple[float, float], quantile: float
) -> dict[str, dict[str, Any]]:
    """Values and intervals of the parameters in which the law is written.

    These are c, N, D of c n_params**N tokens**D for every axis; E, A, B, alpha, beta of the minimum
    loss; and the shape of the basin.
    """
    own = parameter_names(len(axes))
    rows = dict(zip(own, np.eye(len(own)), strict=True))
    for axis in axes:
        along, at = rows.pop(f"{axis}.along"), rows[f"{axis}.D"]
        rows[f"{axis}.c"] = rows[f"{axis}.c"] - along * centre[0] - at * (centre[1] - centre[0])
        rows[f"{axis}.N"] = along - at
    rows["loss.A"] = rows["loss.A"] + centre[0] * rows["loss.alpha"]
    rows["loss.B"] = rows["loss.B"] + centre[1] * rows["loss.beta"]
    logs = {"loss.E", "loss.A", "loss.B", "reach.lr"}
    logs |= {name for name in rows if name.endswith(".c") or name.startswith("curvature")}
    params = {}
    for name in sorted(rows, key=_position):
        row = rows[name]
        value = float(row @ solution.theta)
        half = quantile * math.sqrt(float(row @ solution.covariance @ row))
        ends = [value, value - half, value + half]
        value, low, high = (
            (math.exp(min(max(v, -600.0), 600.0)) for v in ends) if name in logs else ends
        )
        params[name] = {"value": value, "interval": [low, high]}
    return params


def _position(name: str) -> tuple[int, int]:
    """Where a parameter is listed."""
    part = PARTS.index(name[-2:]) if name[-2:] in PARTS else len(PARTS)
    return GROUPS.index(name.split(".")[0]), part


def own_optima(
    kept: pd.DataFrame,
    axes: Sequence[str],
    centre: tuple[float, float],
    pooled: JointSolution,
    level: float,
) -> list[Row]:
    """The optimum of each cell: shape and noise from all cells, optimum and loss from its runs."""
    runs, _ = gather(kept, axes, centre)
    prior = np.column_stack([pooled.theta, np.sqrt(np.diag(pooled.covariance))])
    alone = solve(
        runs,
        prior,
        scatter=np.array([*ALONE[: len(axes)], ALONE[-1]]),
        noise=(pooled.scales.noise, pooled.scales.misfit),
        rounds=3,
    )
    groups = list(kept.groupby("cell", sort=True))
    return [_own(group, axes, centre, alone, i, level) for i, (_, group) in enumerate(groups)]


def _own(
    group: pd.DataFrame,
    axes: Sequence[str],
    centre: tuple[float, float],
    alone: JointSolution,
    i: int,
    level: float,
) -> Row:
    """One cell: optimum, standard errors (of logs), intervals, minimum loss, shape of its basin."""
    from scipy import stats

    k, z = len(axes), float(stats.norm.ppf(0.5 + level / 2))
    n_params, tokens = float(group["n_params"].median()), float(group["tokens"].median())
    n, d = math.log(n_params) - centre[0], math.log(tokens) - centre[1]
    at = _values(alone.theta, k, n, d) + alone.delta[i]
    slope = _slopes(alone.theta, k, n, d)
    mixed = slope @ alone.cross[i]
    spread = slope @ alone.covariance @ slope.T + alone.own[i] + mixed + mixed.T
    se = np.sqrt(np.maximum(np.diag(spread), 0.0))
    row: Row = {"n_params": n_params, "tokens": tokens, "n_runs": len(group)}
    for axis, x, error in zip(axes, at, se, strict=False):
        column, ends = COLUMNS[axis], [math.exp(x - z * error), math.exp(x + z * error)]
        row |= {column: math.exp(x), f"{column}_interval": ends, f"{axis}_se": float(error)}
    runs = group[["lr", "batch_tokens", "loss"]].to_numpy(float)
    row |= {
        "x": [float(v) for v in at[:k]],
        "se": float(se[0]),
        "interval": row["lr_interval"],
        "floor": math.exp(at[k]),
        "floor_se": float(se[k] * math.exp(at[k])),
        "scale": math.exp(float(n * alone.theta[-2] + d * alone.theta[-1])),
        "runs": [" ".join(f"{v:.6g}" for v in run) for run in runs],  # one line per run
        "shape": [float(v) for v in alone.theta[3 * k + 5 : -2]],
    }
    return row | {"status": diagnostics.edge(group, row, axes, COLUMNS)}


def _values(theta: Array, k: int, n: float, d: float) -> Array:
    """The ln optimum and ln minimum loss of the law at (n, d): (axes + 1,)."""
    e, a, b, alpha, beta = theta[3 * k : 3 * k + 5]
    ln_minimum = np.logaddexp.reduce([e, a - alpha * n, b - beta * d])
    basis = law_basis(np.array([n]), np.array([d]))[0]
    return np.append(theta[: 3 * k].reshape(k, 3) @ basis, ln_minimum)


def _slopes(theta: Array, k: int, n: float, d: float) -> Array:
    """The derivatives of `_values` to theta: (axes + 1, P)."""
    out = np.zeros((k + 1, len(theta)))
    for i in range(k):
        out[i, 3 * i : 3 * i + 3] = law_basis(np.array([n]), np.array([d]))[0]
    e, a, b, alpha, beta = theta[3 * k : 3 * k + 5]
    terms = [e, a - alpha * n, b - beta * d]
    share = np.exp(np.array(terms) - np.logaddexp.reduce(terms))
    out[k, 3 * k : 3 * k + 5] = [*share, -n * share[1], -d * share[2]]
    return out


def compare_joint(prediction: Prediction, cell: Row) -> Row:
    """Compares a prediction with a cell's own optimum, as `compare` does, and with its batch size.

    `excess`: the cell's own basin at the predicted point, relative to its minimum loss. Intervals
    are widened by the error of the measurement.
    """
    assert prediction.lr and prediction.batch_tokens and prediction.loss
    x = [math.log(getattr(prediction, COLUMNS[axis]) or 1.0) for axis in AXES[: len(cell["x"])]]
    offset = np.array([x]) - np.array(cell["x"])
    excess = float(basin_excess(offset, np.array(cell["shape"]))[0][0]) * cell["scale"]
    row: Row = {key: cell[key] for key in ("n_params", "tokens", "status")}
    row |= {"excess": excess, "in_band": excess <= BAND}
    for name, key, error in (
        ("lr", "covered", cell["lr_se"]),
        ("batch_tokens", "batch_covered", cell["batch_se"]),
    ):
        predicted, measured = getattr(prediction, name), cell[name]
        row |= {
            f"predicted_{name}": predicted,
            f"measured_{name}": measured,
            key: covers(prediction.interval[name], predicted, measured, error),
        }
    row |= {
        "ratio": prediction.lr / cell["lr"],
        "predicted_loss": prediction.loss,
        "measured_loss": cell["floor"],
    }
    relative_se = cell["floor_se"] / cell["floor"]
    covered = covers(prediction.interval["loss"], prediction.loss, cell["floor"], relative_se)
    return row | {"loss_ratio": prediction.loss / cell["floor"], "loss_covered": covered}


def hold_out(
    fit: Fit, table: pd.DataFrame, unseen: pd.DataFrame, holdout: str | None
) -> dict[str, Any]:
    """How the law predicts cells that it was not fitted to.

    Args:
        fit: The fit.
        table: The runs that were given to the fit.
        unseen: The runs of the held-out cells.
        holdout: The expression that holds them out; None: leave-one-cell-out cross-validation.

    Returns:
        The content of `Fit.held_out`; empty if there are too few cells to leave one out.
    """
    if holdout:
        kept, _ = usable(unseen)
        axes, centre = fit.solution["axes"], tuple(fit.solution["centre"])
        cells = own_optima(kept, axes, centre, _pooled(fit), fit.level) if len(kept) else []
        rows = [compare_joint(_at(fit, cell), cell) for cell in cells]
        return _summary(f"hold-out: {holdout}", rows, runs=list(unseen["id"]))
    kept = table[table["id"].isin(fit.used)]
    by_number = dict(zip(sorted(kept["cell"].unique()), fit.cells, strict=True))
    if len(by_number) < LAW + 1:
        return {}
    folds = min(len(by_number), FOLDS, max(REFITTED_RUNS // len(kept), 4))
    compared: list[Row] = []
    for fold in tqdm(range(folds), "cross-validation", disable=None, leave=False):
        held = list(by_number)[fold::folds]
        runs, centre = gather(kept[~kept["cell"].isin(held)], fit.solution["axes"])
        without = record(solve(runs, fit_prior(runs)), fit.solution["axes"], centre, fit.level)
        compared += [compare_joint(_at(without, by_number[cell]), by_number[cell]) for cell in held]
    return _summary("leave-one-cell-out", compared)


def _at(fit: Fit, cell: Row) -> Prediction:
    return from_fit(fit, n_params=cell["n_params"], tokens=cell["tokens"])


def _pooled(fit: Fit) -> JointSolution:
    """The parts of a solution that `own_optima` reads, from a record."""
    rows, empty = fit.solution["covariance"], np.zeros(0)
    return JointSolution(
        theta=np.array(fit.solution["vector"]),
        delta=empty,
        covariance=np.array([[float(v) for v in line.split()] for line in rows]),
        own=empty,
        cross=empty,
        scales=Scales(
            fit.solution["noise"], fit.solution["misfit"], np.array(fit.solution["scatter"])
        ),
        excess=empty,
        residuals=empty,
        objective=fit.objective,
    )


def _summary(kind: str, rows: list[Row], **others: Any) -> dict[str, Any]:
    known = [row["batch_covered"] for row in rows if row["batch_covered"] is not None]
    coverage = sum(known) / len(known) if known else None
    return summarize(kind, rows, batch_coverage=coverage, **others)


def _assumptions() -> list[str]:
    return [
        "the loss basin has the same shape at all scales, times a power of n_params and tokens",
        "exponents that the runs do not determine keep their prior, which comes from published laws"
        " (scaletune/surface/prior.py, PRIORS)",
        f"near-optimal band: loss within {BAND:.2%} of the optimum, the other settings at their"
        " optimum",
        "settings deviate from the law independently and normally in logs; the target deviates no"
        " more than the fitted settings",
    ]
