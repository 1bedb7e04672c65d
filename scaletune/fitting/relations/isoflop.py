"""The compute-optimal model size from runs at equal compute, or from training curves.

Approach 2 of arXiv:2203.15556 fits a parabola in ln n_params to the runs of each FLOP budget, and a
power law to the minima. Approach 1 takes the lowest training curve at each level of compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.relations.critical import LOSS
from scaletune.fitting.relations.curves import FLOPS
from scaletune.fitting.relations.parabola_bias import compare_with_additive_law
from scaletune.fitting.relations.relation import (
    Array,
    Box,
    Columns,
    Relation,
    RelationColumn,
    Values,
)
from scaletune.fitting.relations.slices import (
    NO_MINIMUM,
    OTHERWISE,
    near_minimum,
    require_budgets,
    robust_parabola,
)

N_BUDGETS = 60  # levels of compute at which the envelope of training curves is computed
N_PARAMS = RelationColumn("n_params", "parameters, as the table counts them")


def _parabola(x: Columns, p: Values) -> Array:
    return p["floor"] * np.exp(p["curvature"] / 2 * np.log(x["n_params"] / p["n_optimal"]) ** 2)


def without_minimum(rows: pd.DataFrame, p: Values) -> str:
    """Why the parabola of a budget has no optimum; "" if its minimum is inside the sizes."""
    sizes = rows["n_params"]
    return "" if sizes.min() < p["n_optimal"] < sizes.max() else NO_MINIMUM


def _parabola_guess(x: Columns, y: Array) -> Values:
    ln_n = np.log(x["n_params"])
    middle = float(ln_n.mean())
    floor, slope, half = robust_parabola(ln_n - middle, np.log(y))
    half = max(half, 1e-6)
    shift = float(np.clip(-slope / (2 * half), -np.ptp(ln_n), np.ptp(ln_n)))
    return {
        "floor": float(np.exp(floor - half * shift**2)),
        "curvature": 2 * half,
        "n_optimal": float(np.exp(middle + shift)),
    }


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
    required=(FLOPS,),
    inputs=(N_PARAMS,),
    output=LOSS,
    parameters={
        "floor": Box(1e-3, 1e4),
        "curvature": Box(1e-6, 10.0),
        "n_optimal": Box(1e-3, 1e16),
    },
    function=_parabola,
    along="n_params",
    groups=("flops",),
    guess=_parabola_guess,
    design=require_budgets,
    select=near_minimum,
    reject=without_minimum,
    otherwise=OTHERWISE,
    compares_sizes=True,
    across=_allocation("isoflop_n", "n_optimal"),
    review=compare_with_additive_law,
)


def envelope(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """run_id, flops, n_params and loss of the lowest training curve at even levels of ln flops.

    Curves are linear in the logs. A level is left out if its lowest curve is that of the smallest
    or the largest size that reaches it: the true lowest may be beyond.
    """
    curves = {
        name: curve.sort_values("flops").drop_duplicates("flops", keep="last")
        for name, curve in rows.groupby(rows["run_id"].astype(str), sort=True)
    }
    short = [name for name, curve in curves.items() if len(curve) < 2]
    dropped = dict.fromkeys(
        rows.loc[rows["run_id"].astype(str).isin(short), "id"], "a training curve needs 2 rows"
    )
    long = [curve for curve in curves.values() if len(curve) > 1]
    if len(long) < 3:
        raise UserError(
            f"frontier needs the training curves of at least 3 runs, but got {len(long)}"
        )
    lowest = min(c["flops"].min() for c in long)
    levels = np.geomspace(lowest, max(c["flops"].max() for c in long), N_BUDGETS)
    lowest_rows = [row for row in (_lowest(long, level) for level in levels) if row]
    if not lowest_rows:
        raise UserError(
            "frontier needs a level of compute at which the lowest training curve is neither of "
            "the smallest nor of the largest size, but there is none: add sizes on both sides"
        )
    return pd.DataFrame(lowest_rows), dropped


def _lowest(curves: Sequence[pd.DataFrame], level: float) -> dict[str, float | str] | None:
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
    # Neighbouring levels of one size are one observation of the allocation.
    return {
        "flops": level,
        "n_params": sizes[best],
        "loss": losses[best],
        "run_id": f"{sizes[best]:g}",
    }


FRONTIER = replace(
    _allocation("frontier", "n_params"),
    formula="n_params = c * flops**p of the lowest training curve at each level of compute",
    source="arXiv:2203.15556, approach 1",
    required=(LOSS,),
    labels=("run_id",),
    reduce=envelope,
    curves=True,
    compares_sizes=True,
)
RELATIONS: Mapping[str, Relation] = {relation.id: relation for relation in (ISOFLOP, FRONTIER)}
