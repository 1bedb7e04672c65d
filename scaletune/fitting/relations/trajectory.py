"""Loss of a size after so many steps at any batch: the staged constants of arXiv:2001.08361 and arXiv:2403.06563, fitted together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaletune.fitting.relations.critical import BATCH, LOSS, N_PARAMS
from scaletune.fitting.relations.relation import Array, Box, Column, Columns, Relation, Values

STEPS = Column("steps", "optimizer steps so far")
ROUNDS = 60  # of the fixed point between the loss and the critical batch at that loss


def converged(x: Columns, p: Values) -> Array:
    """L(N) = (n_c / N)**alpha_n    arXiv:2001.08361, eq. 1.1."""
    return (p["n_c"] / x["n_params"]) ** p["alpha_n"]


def steps_min(x: Columns, p: Values, loss: Array) -> Array:
    """S_min = S / (1 + B_crit(L) / B), B_crit = batch_star / L**(1 / alpha_b)    arXiv:2001.08361, eq. 1.4, 5.4."""
    return x["steps"] / (1 + p["batch_star"] / loss ** (1 / p["alpha_b"]) / x["batch_tokens"])


def trajectory(x: Columns, p: Values) -> Array:
    """L = (n_c / N)**alpha_n + (s_c / S_min)**alpha_s, where S_min itself knows L through B_crit    arXiv:2001.08361, eq. 1.6.

    The right side falls in L, so its fixed point is one: solved by bisection in ln L, each row by itself.
    """
    floor = converged(x, p)
    low, high = np.log(floor), np.log(floor + 50.0)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        above = floor + (p["s_c"] / steps_min(x, p, np.exp(middle))) ** p["alpha_s"] > np.exp(
            middle
        )
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.exp((low + high) / 2)


SIZES = {"n_c": Box(1e9, 1e18), "alpha_n": Box(0.01, 0.5)}
CONVERGED = Relation(
    id="kaplan_n", formula="loss = (n_c / n_params)**alpha_n", source="arXiv:2001.08361, eq. 1.1", inputs=(N_PARAMS,), output=LOSS,
    parameters=SIZES, function=converged, along="n_params",
)  # fmt: skip
TRAJECTORY = Relation(
    id="kaplan_trajectory",
    formula="loss = (n_c / n_params)**alpha_n + (s_c / steps_min)**alpha_s; steps_min = steps / (1 + batch_critical / batch_tokens); "
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
