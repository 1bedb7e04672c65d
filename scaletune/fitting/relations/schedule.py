"""The loss along a run from its learning-rate schedule: annealing and multi-power laws. A row a logged step, in order, with its run_id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.relations.critical import LOSS
from scaletune.fitting.relations.relation import Array, Box, Column, Columns, Relation, Values

LOGGED = 400  # rows that a whole schedule is read at

STEP = Column("step", "optimizer steps done")
LR = Column("lr", "learning rate at that step", positive=False)


def logged(lrs: Sequence[float]) -> dict[str, Array]:
    """`step` and `lr` of a whole schedule, one lr a step, as a run that logs LOGGED rows of it, the last among them."""
    steps = np.unique(np.linspace(1, len(lrs), LOGGED).round())
    return {"step": steps, "lr": np.asarray(lrs, float)[steps.astype(int) - 1]}


def areas(table: pd.DataFrame) -> dict[str, Any]:
    """s1: sum of lr over all steps so far; run: the run's number; first: where it starts. Between logged steps lr is taken as linear."""
    run = table["run_id"].astype(str) if "run_id" in table else pd.Series("run", index=table.index)
    number, _ = pd.factorize(run)
    step, lr = table["step"].to_numpy(float), table["lr"].to_numpy(float)
    same = np.concatenate([[False], number[1:] == number[:-1]])
    gap = np.diff(step, prepend=0.0)
    if (same & (gap <= 0)).any() or len(set(number[~same])) != int((~same).sum()):
        raise UserError(
            "a schedule law needs each run's rows together and its steps rising: sort by run_id and step"
        )
    mean = np.where(same, (lr + np.concatenate([[0.0], lr[:-1]])) / 2, lr)
    area = np.where(same, gap, step) * mean
    s1 = np.concatenate([np.cumsum(area[number == n]) for n in range(number.max() + 1)])
    return {"s1": s1, "run": number.astype(float)}


def _annealed(x: Columns, lam: float) -> Array:
    """S2 = sum_i m_i over steps, m_i = lam m_(i-1) + (lr_(i-1) - lr_i)    arXiv:2408.11029, eq. 3; linear between logged steps."""
    result = np.zeros_like(x["lr"])
    for n in np.unique(x["run"]):
        at = np.flatnonzero(x["run"] == n)
        steps, lr = x["step"][at], x["lr"][at]
        gap = np.diff(steps)
        fall = -np.diff(lr) / gap  # a step's fall, the same for all steps between two rows
        momentum, total = 0.0, 0.0
        for i, (n_steps, each) in enumerate(zip(gap, fall, strict=True)):
            settled, power = each / (1 - lam), lam**n_steps
            total += settled * n_steps + (momentum - settled) * lam * (1 - power) / (1 - lam)
            momentum = settled + (momentum - settled) * power
            result[at[i + 1]] = total
    return result


def annealing(x: Columns, p: Values) -> Array:
    return p["E"] + p["A"] * x["s1"] ** -p["alpha"] - p["C"] * _annealed(x, 1 - p["forget"])


def multi_power(x: Columns, p: Values) -> Array:
    """E + A S1**-alpha - sum_k B (lr_(k-1) - lr_k) (1 - (1 + C lr_k**-gamma (S1 - S1_(k-1)))**-beta)    arXiv:2503.12811, eq. 4."""
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
    formula="loss = E + A * s1**-alpha - C * s2(forget); s1: sum of lr; s2: sum of lr's falls, forgotten at rate `forget` a step",
    source="arXiv:2408.11029",
    inputs=(STEP, LR),
    output=LOSS,
    parameters=BASE | {"C": Box(1e-3, 50.0), "forget": Box(1e-4, 0.05)},
    function=annealing,
    along="step",
    prepare=areas,
    curves=True,
)
MULTI_POWER = Relation(
    id="multi_power",
    formula="loss = E + A * s1**-alpha - sum_k B * (lr_k-1 - lr_k) * (1 - (1 + C * lr_k**-gamma * (s1 - s1_k-1))**-beta)",
    source="arXiv:2503.12811",
    inputs=(STEP, LR),
    output=LOSS,
    parameters=BASE
    | {"B": Box(1.0, 1e5), "C": Box(1e-3, 100.0), "beta": Box(0.05, 2.0), "gamma": Box(0.05, 2.0)},
    function=multi_power,
    along="step",
    prepare=areas,
    curves=True,
)
RELATIONS: Mapping[str, Relation] = {relation.id: relation for relation in (ANNEALING, MULTI_POWER)}
