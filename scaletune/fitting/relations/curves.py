"""One metric against one quantity, and seconds a step against what a step moves and computes: forms without a theory of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.relations.critical import LOSS
from scaletune.fitting.relations.relation import Array, Box, Column, Columns, Relation, Values

FLOPS = Column("flops", "training FLOPs")


def broken(x: Array, p: Values) -> Array:
    """E + A x**-c0 (1 + (x / d)**(1 / f))**(-c1 f): a power law whose exponent turns from c0 to c0 + c1 at d (arXiv:2210.14891, eq. 1, n = 1)."""
    return p["E"] + p["A"] * x ** -p["c0"] * (1 + (x / p["d"]) ** (1 / p["f"])) ** (
        -p["c1"] * p["f"]
    )


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
        "E": Box(1e-3, 6.0), "A": Box(1e-2, 1e6), "c0": Box(0.005, 1.0), "c1": Box(-1.0, 1.0, log=False), "d": Box(1e12, 1e26),
        "f": Box(0.05, 2.0),
    },
    function=lambda x, p: broken(x["flops"], p),
    along="flops",
)  # fmt: skip
LEARNING_CURVE = Relation(
    id="learning_curve",
    formula="loss = E + A * tokens**-alpha, of one run at a constant learning rate",
    source="arXiv:1712.00409",
    inputs=(Column("tokens", "tokens seen so far"),),
    output=LOSS,
    parameters={"E": Box(0.05, 8.0), "A": Box(1e-2, 1e9), "alpha": Box(0.03, 1.5)},
    function=saturating,
    along="tokens",
)
SECONDS = Relation(
    id="seconds_per_step",
    formula="seconds_per_step = overhead + bytes_moved / bytes_per_second + flops_per_step / flops_per_second",
    source="after arXiv:2406.18922, which regresses on memory copies; calibrated on your own records",
    inputs=(
        Column("bytes_moved", "bytes a step reads and writes"),
        Column("flops_per_step", "FLOPs of a step"),
    ),
    output=Column("seconds_per_step", "seconds"),
    parameters={
        "overhead": Box(1e-7, 10.0),
        "bytes_per_second": Box(1e8, 1e14),
        "flops_per_second": Box(1e8, 1e18),
    },
    function=_seconds,
    along="flops_per_step",
)


NEAR = 5.0  # a parabola in ln n_params holds for sizes within this factor of the best


def _near(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose size is within NEAR of the lowest loss's."""
    sizes = rows["n_params"].to_numpy(float)
    return rows[
        np.abs(np.log(sizes / sizes[rows["loss"].to_numpy(float).argmin()])) <= np.log(NEAR)
    ]


def _parabola(x: Columns, p: Values) -> Array:
    return p["floor"] * np.exp(p["curvature"] / 2 * np.log(x["n_params"] / p["n_optimal"]) ** 2)


def _allocation(law: str, output: str) -> Relation:
    return Relation(
        id=law, formula=f"{output} = c * flops**p", source="arXiv:2203.15556, approach 2", inputs=(FLOPS,),
        output=Column(output, "parameters"), parameters={"c": Box(1e-30, 1e15, far=True), "p": Box(0.0, 1.5, log=False)},
        function=lambda x, p: p["c"] * x["flops"] ** p["p"], along="flops", robust=False,
    )  # fmt: skip


ISOFLOP = Relation(
    id="isoflop",
    formula="ln loss = ln floor + curvature / 2 * ln(n_params / n_optimal)**2 at each `flops`; n_optimal = c * flops**p",
    source="arXiv:2203.15556, approach 2",
    inputs=(Column("n_params", "parameters, as the table counts them"),),
    output=LOSS,
    parameters={"floor": Box(0.3, 8.0), "curvature": Box(1e-4, 1.0), "n_optimal": Box(1e4, 1e13)},
    function=_parabola,
    along="n_params",
    groups=("flops",),
    select=_near,
    across=_allocation("isoflop_n", "n_optimal"),
)
BUDGETS = 60  # levels of compute at which the envelope of training curves is read


def envelope(rows: pd.DataFrame) -> pd.DataFrame:
    """flops, n_params and loss of the lowest of all training curves at evenly spaced levels of ln flops; curves are linear in the logs.

    Levels at which the lowest curve is the smallest or largest size that reaches them are left out: the lowest may lie beyond.
    """
    needed = ("run_id", "flops", "n_params", "loss")
    if missing := next((name for name in needed if name not in rows), None):
        raise UserError(
            f"frontier reads training curves, rows of {', '.join(needed)}, but there is no `{missing}`"
        )
    curves = [curve.sort_values("flops") for _, curve in rows.groupby("run_id") if len(curve) > 1]
    if len(curves) < 3:
        raise UserError(
            f"frontier needs the training curves of at least 3 runs, but got {len(curves)}"
        )
    levels = np.geomspace(
        min(c["flops"].min() for c in curves), max(c["flops"].max() for c in curves), BUDGETS
    )
    found = [_lowest(curves, level) for level in levels]
    return pd.DataFrame([row for row in found if row])


def _lowest(curves: Sequence[pd.DataFrame], level: float) -> dict[str, float] | None:
    there = [c for c in curves if c["flops"].iloc[0] <= level <= c["flops"].iloc[-1]]
    sizes = [float(c["n_params"].iloc[0]) for c in there]
    losses = [
        float(np.exp(np.interp(np.log(level), np.log(c["flops"]), np.log(c["loss"]))))
        for c in there
    ]
    if len(set(sizes)) < 3:
        return None
    best = int(np.argmin(losses))
    return (
        None
        if sizes[best] in (min(sizes), max(sizes))
        else {"flops": level, "n_params": sizes[best], "loss": losses[best]}
    )


FRONTIER = replace(
    _allocation("frontier", "n_params"),
    formula="n_params = c * flops**p of the lowest training curve at each level of compute",
    source="arXiv:2203.15556, approach 1",
    reduce=envelope,
)
RELATIONS: Mapping[str, Relation] = {
    relation.id: relation for relation in (BROKEN, LEARNING_CURVE, SECONDS, ISOFLOP, FRONTIER)
}
