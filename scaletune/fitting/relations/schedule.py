"""Loss along a run from its learning-rate schedule: the annealing law and the multi-power law.

A table has one row per logged step, with the rows of a run (`run_id`) in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

N_LOGGED = 400  # rows of a sampled schedule

STEP = RelationColumn("step", "optimizer steps so far")
LR = RelationColumn("lr", "learning rate at that step", positive=False)


def sample_schedule(lrs: Sequence[float]) -> dict[str, Array]:
    """`step` and `lr` of at most N_LOGGED steps of a schedule, the last step included.

    `lrs` has one learning rate per step.
    """
    steps = np.unique(np.linspace(1, len(lrs), N_LOGGED).round())
    return {"step": steps, "lr": np.asarray(lrs, float)[steps.astype(int) - 1]}


def lr_areas(table: pd.DataFrame) -> dict[str, Any]:
    """Columns `s1`: sum of lr over all steps so far, and `run`: the number of the run.

    lr is taken as linear between logged steps.
    """
    run = table["run_id"].astype(str) if "run_id" in table else pd.Series("run", index=table.index)
    number, _ = pd.factorize(run)
    step, lr = table["step"].to_numpy(float), table["lr"].to_numpy(float)
    same = np.concatenate([[False], number[1:] == number[:-1]])
    gap = np.diff(step, prepend=0.0)
    if (same & (gap <= 0)).any() or len(set(number[~same])) != int((~same).sum()):
        raise UserError(
            "a schedule law needs the rows of each run together and its steps increasing: "
            "sort by run_id and step"
        )
    mean = np.where(same, (lr + np.concatenate([[0.0], lr[:-1]])) / 2, lr)
    area = np.where(same, gap, step) * mean
    s1 = np.concatenate([np.cumsum(area[number == n]) for n in range(number.max() + 1)])
    return {"s1": s1, "run": number.astype(float)}


def annealing_area(x: Columns, lam: float) -> Array:
    """S2 = sum_i m_i over steps, m_i = lam m_(i-1) + (lr_(i-1) - lr_i)    arXiv:2408.11029, eq. 3.

    lr is taken as linear between logged steps, for which the sum has a closed form.
    """
    result = np.zeros_like(x["lr"])
    for n in np.unique(x["run"]):
        at = np.flatnonzero(x["run"] == n)
        steps, lr = x["step"][at], x["lr"][at]
        gap = np.diff(steps)
        fall = -np.diff(lr) / gap  # decrease of lr per step, constant between two rows
        momentum, total = 0.0, 0.0
        for i, (n_steps, each) in enumerate(zip(gap, fall, strict=True)):
            settled, power = each / (1 - lam), lam**n_steps
            total += settled * n_steps + (momentum - settled) * lam * (1 - power) / (1 - lam)
            momentum = settled + (momentum - settled) * power
            result[at[i + 1]] = total
    return result


def annealing(x: Columns, p: Values) -> Array:
    return p["E"] + p["A"] * x["s1"] ** -p["alpha"] - p["C"] * annealing_area(x, 1 - p["forget"])


def multi_power(x: Columns, p: Values) -> Array:
    """The multi-power law    arXiv:2503.12811, eq. 4.

    E + A S1**-alpha
    - sum_k B (lr_(k-1) - lr_k) (1 - (1 + C lr_k**-gamma (S1 - S1_(k-1)))**-beta)
    """
    lost = np.zeros_like(x["lr"])
    for n in np.unique(x["run"]):
        at = np.flatnonzero(x["run"] == n)
        lr, s1 = x["lr"][at], x["s1"][at]
        fall, later = lr[:-1] - lr[1:], s1[:, None] - s1[None, :-1]
        grown = 1 + p["C"] * np.maximum(lr[1:], 1e-12) ** -p["gamma"] * np.maximum(later, 0)
        lost[at] = (p["B"] * fall * (1 - grown ** -p["beta"]) * (later > 0)).sum(1)
    return p["E"] + p["A"] * x["s1"] ** -p["alpha"] - lost


BASE = {"E": Box(0.2, 6.0), "A": Box(1e-3, 50.0), "alpha": Box(0.1, 1.5)}
ANNEALING = Relation(
    id="annealing",
    formula="loss = E + A * s1**-alpha - C * s2(forget); s1: sum of lr; "
    "s2: sum of the decreases of lr with a momentum that decays at rate `forget` per step",
    source="arXiv:2408.11029",
    inputs=(STEP, LR),
    output=LOSS,
    parameters=BASE | {"C": Box(1e-3, 50.0), "forget": Box(1e-4, 0.05)},
    function=annealing,
    along="step",
    prepare=lr_areas,
    curves=True,
)
MULTI_POWER = Relation(
    id="multi_power",
    formula="loss = E + A * s1**-alpha - sum_k B * (lr_k-1 - lr_k) "
    "* (1 - (1 + C * lr_k**-gamma * (s1 - s1_k-1))**-beta)",
    source="arXiv:2503.12811",
    inputs=(STEP, LR),
    output=LOSS,
    parameters=BASE
    | {"B": Box(1.0, 1e5), "C": Box(1e-3, 100.0), "beta": Box(0.05, 2.0), "gamma": Box(0.05, 2.0)},
    function=multi_power,
    along="step",
    prepare=lr_areas,
    curves=True,
)
RELATIONS: Mapping[str, Relation] = {relation.id: relation for relation in (ANNEALING, MULTI_POWER)}
