"""Empirical curves: loss against compute, tokens or model size, and seconds per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.relations.critical import LOSS
from scaletune.fitting.relations.relation import (
    Array,
    Box,
    Columns,
    Relation,
    RelationColumn,
    Values,
)

FLOPS = RelationColumn("flops", "training FLOPs")


def broken(x: Array, p: Values) -> Array:
    """A power law whose exponent changes from c0 to c0 + c1 at d (arXiv:2210.14891, eq. 1, n = 1).

    E + A x**-c0 (1 + (x / d)**(1 / f))**(-c1 f)
    """
    bend = (1 + (x / p["d"]) ** (1 / p["f"])) ** (-p["c1"] * p["f"])
    return p["E"] + p["A"] * x ** -p["c0"] * bend


def saturating(x: Columns, p: Values) -> Array:
    return p["E"] + p["A"] * x["tokens"] ** -p["alpha"]


def _seconds(x: Columns, p: Values) -> Array:
    return (
        p["overhead"]
        + x["bytes_moved"] / p["bytes_per_second"]
        + x["flops_per_step"] / p["flops_per_second"]
    )


BROKEN = Relation(
    id="broken_flops",
    formula="loss = E + A * flops**-c0 * (1 + (flops / d)**(1 / f))**(-c1 * f)",
    source="arXiv:2210.14891, eq. 1, one break",
    inputs=(FLOPS,),
    output=LOSS,
    parameters={
        "E": Box(1e-3, 6.0),
        "A": Box(1e-2, 1e6),
        "c0": Box(0.005, 1.0),
        "c1": Box(-1.0, 1.0, log=False),
        "d": Box(1e12, 1e26),
        "f": Box(0.05, 2.0),
    },
    function=lambda x, p: broken(x["flops"], p),
    along="flops",
)
LEARNING_CURVE = Relation(
    id="learning_curve",
    formula="loss = E + A * tokens**-alpha, of one run at a constant learning rate",
    source="arXiv:1712.00409",
    inputs=(RelationColumn("tokens", "tokens seen so far"),),
    output=LOSS,
    parameters={"E": Box(0.05, 8.0), "A": Box(1e-2, 1e9), "alpha": Box(0.03, 1.5)},
    function=saturating,
    along="tokens",
)
SECONDS = Relation(
    id="seconds_per_step",
    formula="seconds_per_step = overhead + bytes_moved / bytes_per_second "
    "+ flops_per_step / flops_per_second",
    source="after arXiv:2406.18922, which regresses on memory copies; calibrated on your records",
    inputs=(
        RelationColumn("bytes_moved", "bytes that a step reads and writes"),
        RelationColumn("flops_per_step", "FLOPs of a step"),
    ),
    output=RelationColumn("seconds_per_step", "seconds"),
    parameters={
        "overhead": Box(1e-7, 10.0),
        "bytes_per_second": Box(1e8, 1e14),
        "flops_per_second": Box(1e8, 1e18),
    },
    function=_seconds,
    along="flops_per_step",
)


NEAR_MINIMUM = 5.0  # the parabola in ln n_params holds within this factor of the best size


def _near_minimum(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows within the factor NEAR_MINIMUM of the size with the lowest loss."""
    sizes = rows["n_params"].to_numpy(float)
    best = sizes[rows["loss"].to_numpy(float).argmin()]
    return rows[np.abs(np.log(sizes / best)) <= np.log(NEAR_MINIMUM)]


def _parabola(x: Columns, p: Values) -> Array:
    return p["floor"] * np.exp(p["curvature"] / 2 * np.log(x["n_params"] / p["n_optimal"]) ** 2)


def _allocation(law: str, output: str) -> Relation:
    return Relation(
        id=law,
        formula=f"{output} = c * flops**p",
        source="arXiv:2203.15556, approach 2",
        inputs=(FLOPS,),
        output=RelationColumn(output, "parameters"),
        parameters={"c": Box(1e-30, 1e15, at_origin=True), "p": Box(0.0, 1.5, log=False)},
        function=lambda x, p: p["c"] * x["flops"] ** p["p"],
        along="flops",
        robust=False,
    )


ISOFLOP = Relation(
    id="isoflop",
    formula="ln loss = ln floor + curvature / 2 * ln(n_params / n_optimal)**2 at each `flops`; "
    "n_optimal = c * flops**p",
    source="arXiv:2203.15556, approach 2",
    inputs=(RelationColumn("n_params", "parameters, as the table counts them"),),
    output=LOSS,
    parameters={"floor": Box(0.3, 8.0), "curvature": Box(1e-4, 1.0), "n_optimal": Box(1e4, 1e13)},
    function=_parabola,
    along="n_params",
    groups=("flops",),
    select=_near_minimum,
    across=_allocation("isoflop_n", "n_optimal"),
)
N_BUDGETS = 60  # levels of compute at which the envelope of training curves is computed


def envelope(rows: pd.DataFrame) -> pd.DataFrame:
    """flops, n_params and loss of the lowest training curve at evenly spaced levels of ln flops.

    Curves are linear in the logs. A level is left out if its lowest curve is that of the smallest
    or the largest size that reaches it: the true lowest may be beyond.
    """
    needed = ("run_id", "flops", "n_params", "loss")
    if missing := next((name for name in needed if name not in rows), None):
        raise UserError(
            f"frontier needs training curves with columns {', '.join(needed)}, "
            f"but there is no `{missing}`"
        )
    curves = [curve.sort_values("flops") for _, curve in rows.groupby("run_id") if len(curve) > 1]
    if len(curves) < 3:
        raise UserError(
            f"frontier needs the training curves of at least 3 runs, but got {len(curves)}"
        )
    lowest = min(c["flops"].min() for c in curves)
    levels = np.geomspace(lowest, max(c["flops"].max() for c in curves), N_BUDGETS)
    rows_at = [_lowest(curves, level) for level in levels]
    return pd.DataFrame([row for row in rows_at if row])


def _lowest(curves: Sequence[pd.DataFrame], level: float) -> dict[str, float] | None:
    """The row of the lowest curve at a level of compute; None at the end of the sizes."""
    reaching = [c for c in curves if c["flops"].iloc[0] <= level <= c["flops"].iloc[-1]]
    sizes = [float(c["n_params"].iloc[0]) for c in reaching]
    losses = [
        float(np.exp(np.interp(np.log(level), np.log(c["flops"]), np.log(c["loss"]))))
        for c in reaching
    ]
    if len(set(sizes)) < 3:
        return None
    best = int(np.argmin(losses))
    if sizes[best] in (min(sizes), max(sizes)):
        return None
    return {"flops": level, "n_params": sizes[best], "loss": losses[best]}


FRONTIER = replace(
    _allocation("frontier", "n_params"),
    formula="n_params = c * flops**p of the lowest training curve at each level of compute",
    source="arXiv:2203.15556, approach 1",
    reduce=envelope,
)
RELATIONS: Mapping[str, Relation] = {
    relation.id: relation for relation in (BROKEN, LEARNING_CURVE, SECONDS, ISOFLOP, FRONTIER)
}
