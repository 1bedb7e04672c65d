"""The law `joint`: from a checked table of runs to a `Fit` of the surface, with every cell's own optimum and the cells held out."""

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
from scaletune.fitting.joint.basin import height
from scaletune.fitting.joint.surface import (
    SCATTER_WEIGHT,
    Runs,
    Scales,
    Solved,
    law_basis,
    names,
    prior,
    solve,
)
from scaletune.fitting.optimum.lr_basin import BAND, REACH
from scaletune.laws.surface import AXES
from scaletune.predicting import Prediction, from_fit
from scaletune.records import Fit

COLUMNS = {"lr": "lr", "batch": "batch_tokens", "wd": "weight_decay"}  # of each axis
LEAST = 5  # usable runs
ALONE = np.array(
    [1.5, 1.5, 1.5, 0.5]
)  # scatter that leaves each cell its own optimum and floor: the law says nothing of them
FOLDS = 20  # at most so many refits to hold cells out
LAW = 3  # parameters of a centre
GROUPS, ORDER = (
    (*AXES, "loss", "curvature", "skew", "reach", "width"),
    (".c", ".E", ".N", ".D", ".A", ".B"),
)  # in which parameters are listed

Array = NDArray[np.float64]
Row = dict[str, Any]


def usable(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Runs the surface is fitted to, and {id: reason} of the others."""
    dropped = {
        i: status
        for i, status in zip(table["id"], table["status"], strict=True)
        if status != "done"
    }
    kept = table[table["status"] == "done"]
    if (kept["loss"] <= 0).any():
        row = kept[kept["loss"] <= 0].iloc[0]
        raise UserError(
            f"`loss` must be above 0 for a surface in its log, but run {row['id']!r} has {row['loss']:g}"
        )
    same = [c for c in ("n_params", "tokens", *COLUMNS.values(), "loss") if c in kept] + (
        ["seed"] if kept["crossed"].all() else []
    )
    copies = kept.duplicated(same)
    dropped |= dict.fromkeys(kept["id"][copies], "a copy of another run, loss and all")
    kept = kept[~copies]
    high = kept["loss"] > (1 + REACH) * kept.groupby("cell")["loss"].transform("min")
    dropped |= dict.fromkeys(
        kept["id"][high],
        f"more than {REACH:.0%} above the lowest loss of its cell: outside the basin that is fitted",
    )
    return kept[~high], dropped


def axes_of(kept: pd.DataFrame) -> list[str]:
    """lr and batch; weight decay when some cell was trained at three or more of them."""
    if (
        "weight_decay" not in kept
        or not (pd.to_numeric(kept["weight_decay"], errors="coerce") > 0).all()
    ):
        return ["lr", "batch"]
    return list(AXES[: 3 if (kept.groupby("cell")["weight_decay"].nunique() >= 3).any() else 2])


def gather(
    kept: pd.DataFrame, axes: Sequence[str], centre: tuple[float, float] | None = None
) -> tuple[Runs, tuple[float, float]]:
    """The runs as arrays, and the middle of their cells in ln n_params and ln tokens."""
    kept = kept.sort_values("cell", kind="stable")
    logs = np.log(
        kept[["n_params", "tokens", "loss", *(COLUMNS[axis] for axis in axes)]].to_numpy(float)
    )
    if centre is None:
        middle = np.log(kept.groupby("cell")[["n_params", "tokens"]].median()).mean()
        centre = (float(middle["n_params"]), float(middle["tokens"]))
    cell = np.unique(kept["cell"], return_inverse=True)[1]
    return Runs(
        logs[:, 0] - centre[0], logs[:, 1] - centre[1], logs[:, 3:], logs[:, 2], cell
    ), centre


def fit_joint(table: pd.DataFrame, said: Sequence[str], level: float) -> Fit:
    """The joint surface of a table from `tabulate`; `said` is put before its status."""
    kept, dropped = usable(table)
    if len(kept) < LEAST:
        reasons = "".join(f"; {reason}" for reason in sorted(set(dropped.values())))
        raise UserError(
            f"the joint surface needs at least {LEAST} usable runs, but got {len(kept)} of {len(table)}{reasons}"
        )
    axes = axes_of(kept)
    runs, centre = gather(kept, axes)
    given = prior(runs)
    solved = solve(runs, given)
    cells = own_optima(kept, axes, centre, solved, level)
    made = record(solved, axes, centre, level)
    status = [*said, *diagnostics.sentences(kept, axes, solved, given, cells), *_copies(dropped)]
    return replace(
        made, cells=cells, used=list(kept["id"]), dropped=dropped, status=status or ["ok"], assumptions=_assumptions(),
        ranges={column: [float(kept[column].min()), float(kept[column].max())] for column in ("n_params", "tokens", "batch_tokens")},
    )  # fmt: skip


def record(solved: Solved, axes: Sequence[str], centre: tuple[float, float], level: float) -> Fit:
    """What a prediction needs, as a Fit: vector, covariance, centre, scatter of cells, quantile."""
    from scipy import stats

    dof = SCATTER_WEIGHT + max(len(solved.delta) - LAW, 0)
    quantile = float(stats.t.ppf(0.5 + level / 2, dof))
    solution: dict[str, Any] = {
        "axes": list(axes),
        "names": names(len(axes)),
        "vector": [float(v) for v in solved.theta],
        "covariance": [
            " ".join(f"{v:.12g}" for v in row) for row in solved.covariance
        ],  # one line a parameter
        "centre": list(centre),
        "scatter": [
            float(v) for v in solved.scales.scatter
        ],  # sd of cells about the law, in logs: axes, floor
        "noise": solved.scales.noise,  # sd of ln loss of one run at the bottom
        "misfit": solved.scales.misfit,
        "dof": dof,
        "quantile": quantile,
        "band": BAND,
    }
    params = natural(solved, axes, centre, quantile)
    return Fit(
        law="joint", params=params, solution=solution, objective=solved.objective, level=level
    )


def natural(
    solved: Solved, axes: Sequence[str], centre: tuple[float, float], quantile: float
) -> dict[str, dict[str, Any]]:
    """Values and intervals of what the law is written in: c n_params**N tokens**D of every axis, E, A, B, alpha, beta, the shape."""
    own = names(len(axes))
    rows = dict(zip(own, np.eye(len(own)), strict=True))
    for axis in axes:
        along, at = rows.pop(f"{axis}.along"), rows[f"{axis}.D"]
        rows[f"{axis}.c"] = rows[f"{axis}.c"] - along * centre[0] - at * (centre[1] - centre[0])
        rows[f"{axis}.N"] = along - at
    rows["loss.A"] = rows["loss.A"] + centre[0] * rows["loss.alpha"]
    rows["loss.B"] = rows["loss.B"] + centre[1] * rows["loss.beta"]
    logs = {
        "loss.E",
        "loss.A",
        "loss.B",
        "reach.lr",
        *(name for name in rows if name.endswith(".c") or name.startswith("curvature")),
    }
    params = {}
    for name in sorted(
        rows,
        key=lambda name: (
            GROUPS.index(name.split(".")[0]),
            ORDER.index(name[-2:]) if name[-2:] in ORDER else len(ORDER),
        ),
    ):
        row = rows[name]
        value, half = (
            float(row @ solved.theta),
            quantile * math.sqrt(float(row @ solved.covariance @ row)),
        )
        ends = [value, value - half, value + half]
        value, low, high = (
            (math.exp(min(max(v, -600.0), 600.0)) for v in ends) if name in logs else ends
        )
        params[name] = {"value": value, "interval": [low, high]}
    return params


def own_optima(
    kept: pd.DataFrame,
    axes: Sequence[str],
    centre: tuple[float, float],
    pooled: Solved,
    level: float,
) -> list[Row]:
    """Each cell's own optimum: the shape of the basin and the noise from all cells, centre and floor from its runs alone."""
    runs, _ = gather(kept, axes, centre)
    k = len(axes)
    sd = np.sqrt(np.diag(pooled.covariance))
    given = np.column_stack([pooled.theta, sd])
    alone = solve(
        runs,
        given,
        scatter=np.array([*ALONE[:k], ALONE[-1]]),
        noise=(pooled.scales.noise, pooled.scales.misfit),
        rounds=3,
    )
    groups = list(kept.groupby("cell", sort=True))
    return [_own(group, axes, centre, alone, i, level) for i, (_, group) in enumerate(groups)]


def _own(
    group: pd.DataFrame,
    axes: Sequence[str],
    centre: tuple[float, float],
    alone: Solved,
    i: int,
    level: float,
) -> Row:
    """One cell's row: optimum, standard errors (of logs), intervals, floor, and the shape its excess is counted with."""
    from scipy import stats

    k, z = len(axes), float(stats.norm.ppf(0.5 + level / 2))
    n_params, tokens = float(group["n_params"].median()), float(group["tokens"].median())
    n, d = math.log(n_params) - centre[0], math.log(tokens) - centre[1]
    at = _values(alone.theta, k, n, d) + alone.delta[i]
    slope = _slopes(alone.theta, k, n, d)
    spread = (
        slope @ alone.covariance @ slope.T
        + alone.own[i]
        + slope @ alone.cross[i]
        + (slope @ alone.cross[i]).T
    )
    se = np.sqrt(np.maximum(np.diag(spread), 0.0))
    row: Row = {"n_params": n_params, "tokens": tokens, "n_runs": len(group)}
    for axis, x, error in zip(axes, at, se, strict=False):
        row |= {
            COLUMNS[axis]: math.exp(x),
            f"{COLUMNS[axis]}_interval": [math.exp(x - z * error), math.exp(x + z * error)],
        }
        row |= {f"{axis}_se": float(error)}
    row |= {
        "x": [float(v) for v in at[:k]],
        "se": float(se[0]),
        "interval": row["lr_interval"],
        "floor": math.exp(at[k]),
    }
    row |= {
        "floor_se": float(se[k] * math.exp(at[k])),
        "scale": math.exp(float(n * alone.theta[-2] + d * alone.theta[-1])),
    }
    columns = ["lr", "batch_tokens", "loss"]
    row |= {
        "runs": [" ".join(f"{v:.6g}" for v in run) for run in group[columns].to_numpy(float)]
    }  # one line a run
    row |= {"shape": [float(v) for v in alone.theta[3 * k + 5 : -2]]}
    return row | {"status": diagnostics.edge(group, row, axes, COLUMNS)}


def _values(theta: Array, k: int, n: float, d: float) -> Array:
    """Centre and ln floor of the law at (n, d): (axes + 1,)."""
    e, a, b, alpha, beta = theta[3 * k : 3 * k + 5]
    floor = np.logaddexp.reduce([e, a - alpha * n, b - beta * d])
    return np.append(
        theta[: 3 * k].reshape(k, 3) @ law_basis(np.array([n]), np.array([d]))[0], floor
    )


def _slopes(theta: Array, k: int, n: float, d: float) -> Array:
    """Their derivatives to theta: (axes + 1, P)."""
    out = np.zeros((k + 1, len(theta)))
    for i in range(k):
        out[i, 3 * i : 3 * i + 3] = law_basis(np.array([n]), np.array([d]))[0]
    e, a, b, alpha, beta = theta[3 * k : 3 * k + 5]
    share = np.exp(
        np.array([e, a - alpha * n, b - beta * d])
        - np.logaddexp.reduce([e, a - alpha * n, b - beta * d])
    )
    out[k, 3 * k : 3 * k + 5] = [*share, -n * share[1], -d * share[2]]
    return out


def judge(prediction: Prediction, cell: Row) -> Row:
    """A prediction against a cell's own optimum: as `compare` does for a law of lr alone, with the batch beside it.

    `excess`: the cell's own basin at the predicted point, in shares of its floor. Intervals are widened by the measurement's error.
    """
    assert prediction.lr and prediction.batch_tokens and prediction.loss
    x = [math.log(getattr(prediction, COLUMNS[axis]) or 1.0) for axis in AXES[: len(cell["x"])]]
    tall = (
        float(height(np.array([x]) - np.array(cell["x"]), np.array(cell["shape"]))[0][0])
        * cell["scale"]
    )
    out: Row = {key: cell[key] for key in ("n_params", "tokens", "status")} | {
        "excess": tall,
        "in_band": tall <= BAND,
    }
    for name, key, error in (
        ("lr", "covered", cell["lr_se"]),
        ("batch_tokens", "batch_covered", cell["batch_se"]),
    ):
        said, found = getattr(prediction, name), cell[name]
        out |= {
            f"predicted_{name}": said,
            f"measured_{name}": found,
            key: covers(prediction.interval[name], said, found, error),
        }
    covered = covers(
        prediction.interval["loss"],
        prediction.loss,
        cell["floor"],
        cell["floor_se"] / cell["floor"],
    )
    out |= {
        "ratio": prediction.lr / cell["lr"],
        "predicted_loss": prediction.loss,
        "measured_loss": cell["floor"],
    }
    return out | {"loss_ratio": prediction.loss / cell["floor"], "loss_covered": covered}


def hold_out(
    made: Fit, table: pd.DataFrame, unseen: pd.DataFrame, holdout: str | None
) -> dict[str, Any]:
    """How the law predicts cells it has not seen: those of `unseen` or, without any, each of its own from the others (empty below four)."""
    if holdout:
        kept, _ = usable(unseen)
        rows = (
            own_optima(
                kept,
                made.solution["axes"],
                tuple(made.solution["centre"]),
                _pooled(made),
                made.level,
            )
            if len(kept)
            else []
        )
        return _summary(
            f"hold-out: {holdout}",
            [judge(_at(made, row), row) for row in rows],
            runs=list(unseen["id"]),
        )
    kept = table[table["id"].isin(made.used)]
    cells = dict(zip(sorted(kept["cell"].unique()), made.cells, strict=True))
    if len(cells) < LAW + 1:
        return {}
    folds, judged = min(len(cells), FOLDS), []
    for fold in tqdm(range(folds), "cells held out", disable=None, leave=False):
        held = list(cells)[fold::folds]
        runs, centre = gather(kept[~kept["cell"].isin(held)], made.solution["axes"])
        without = record(solve(runs, prior(runs)), made.solution["axes"], centre, made.level)
        judged += [judge(_at(without, cells[cell]), cells[cell]) for cell in held]
    return _summary("leave-one-cell-out", judged)


def _at(made: Fit, cell: Row) -> Prediction:
    return from_fit(made, n_params=cell["n_params"], tokens=cell["tokens"])


def _pooled(made: Fit) -> Solved:
    """As much of a solution as measuring other cells with its shape takes."""
    covariance = np.array(
        [[float(v) for v in line.split()] for line in made.solution["covariance"]]
    )
    scales = Scales(
        made.solution["noise"], made.solution["misfit"], np.array(made.solution["scatter"])
    )
    empty = np.zeros(0)
    return Solved(
        np.array(made.solution["vector"]),
        empty,
        covariance,
        empty,
        empty,
        scales,
        empty,
        empty,
        made.objective,
    )


def _summary(kind: str, judged: list[Row], **others: Any) -> dict[str, Any]:
    known = [row["batch_covered"] for row in judged if row["batch_covered"] is not None]
    return summarize(
        kind, judged, batch_coverage=sum(known) / len(known) if known else None, **others
    )


def _copies(dropped: dict[str, str]) -> list[str]:
    n = sum(reason.startswith("a copy") for reason in dropped.values())
    return [f"{n} runs are copies of others, loss and all, and are left out"] if n else []


def _assumptions() -> list[str]:
    return [
        "the basin has one shape at all scales, but for a height that is a power of n_params and tokens",
        "exponents lean on published laws as far as the runs leave them open (fitting/joint/surface.py, PRIORS)",
        f"the near-optimal band is where loss is within {BAND:.2%} of the optimum's, the other settings held at theirs",
        "cells deviate from the law as independent normals in logs, targets no more than the cells fitted",
    ]
