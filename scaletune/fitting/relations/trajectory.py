"""Loss of a model size after a number of steps at any batch size.

The relation of arXiv:2001.08361, whose constants arXiv:2403.06563 fits in stages, fitted at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaletune.fitting.relations.critical import BATCH, LOSS, N_PARAMS
from scaletune.fitting.relations.relation import (
    Array,
    Box,
    Columns,
    Relation,
    RelationColumn,
    Values,
)

STEPS = RelationColumn("steps", "optimizer steps so far")
ROUNDS = 60  # bisection steps for the loss, on which the critical batch size depends


def converged_loss(x: Columns, p: Values) -> Array:
    """L(N) = (n_c / N)**alpha_n    arXiv:2001.08361, eq. 1.1."""
    return (p["n_c"] / x["n_params"]) ** p["alpha_n"]


def steps_min(x: Columns, p: Values, loss: Array) -> Array:
    """S_min = S / (1 + B_crit(L) / B)    arXiv:2001.08361, eq. 5.4.

    B_crit = batch_star / L**(1 / alpha_b), eq. 1.4.
    """
    return x["steps"] / (1 + p["batch_star"] / loss ** (1 / p["alpha_b"]) / x["batch_tokens"])


def trajectory(x: Columns, p: Values) -> Array:
    """L = (n_c / N)**alpha_n + (s_c / S_min)**alpha_s    arXiv:2001.08361, eq. 1.6.

    S_min depends on L through B_crit. The right side decreases in L, so there is one solution.
    It is found by bisection in ln L, for each row.
    """
    minimum = converged_loss(x, p)
    low, high = np.log(minimum), np.log(minimum + 50.0)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        loss = np.exp(middle)
        above = minimum + (p["s_c"] / steps_min(x, p, loss)) ** p["alpha_s"] > loss
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.exp((low + high) / 2)


SIZES = {"n_c": Box(1e9, 1e18), "alpha_n": Box(0.01, 0.5)}
CONVERGED = Relation(
    id="kaplan_n",
    formula="loss = (n_c / n_params)**alpha_n",
    source="arXiv:2001.08361, eq. 1.1",
    inputs=(N_PARAMS,),
    output=LOSS,
    parameters=SIZES,
    function=converged_loss,
    along="n_params",
)
TRAJECTORY = Relation(
    id="kaplan_trajectory",
    formula="loss = (n_c / n_params)**alpha_n + (s_c / steps_min)**alpha_s; "
    "steps_min = steps / (1 + batch_critical / batch_tokens); "
    "batch_critical = batch_star / loss**(1 / alpha_b)",
    source="arXiv:2001.08361, eq. 1.6; staged in arXiv:2403.06563",
    inputs=(N_PARAMS, STEPS, BATCH),
    output=LOSS,
    parameters=SIZES
    | {
        "s_c": Box(1e1, 1e6),
        "alpha_s": Box(0.1, 2.0),
        "batch_star": Box(1e4, 1e12),
        "alpha_b": Box(0.05, 1.0),
    },
    function=trajectory,
    along="steps",
    curves=True,
)
RELATIONS: Mapping[str, Relation] = {relation.id: relation for relation in (CONVERGED, TRAJECTORY)}
