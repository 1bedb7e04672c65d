"""Forms of the loss law side by side, and a law judged on sizes it has not seen; all refits are batched with weights of 0 for what is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.fitting.loss.functional_forms import (
    BOX,
    BROKEN,
    CHINCHILLA,
    INTERACTION,
    Form,
    pose,
    shape,
)
from scaletune.fitting.loss.law import SPREAD, draw, solve
from scaletune.fitting.loss.record import solution
from scaletune.fitting.loss.variable_projection import Problem, descend, starts
from scaletune.fitting.stats.robust import SQUARES, Huber, Student
from scaletune.fitting.table import levels
from scaletune.predicting import loss_at

FOLDS = 6
STEPS = 50  # of Newton: forms with more parameters than the runs identify creep along a valley
SOLVED = 3  # points of a candidate's grids that are solved, of those whose starts are compared
CLEARLY = 10.0  # AICc below the fitted form's from which another form is said to fit better (Burnham & Anderson 2002)
ENOUGH = 12  # runs from which forms are compared
MANY = 500  # runs above which a fit leaves comparing forms to `compare_forms`, and leaves nothing out: it stays under a second

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A form, what of it is fixed, and grids of the parameters that are not exponents: an outer power, a break and its sharpness."""

    formula: str
    source: str
    form: Form
    fixed: Mapping[str, float | str]
    powers: tuple[float, ...] = (1.0,)  # p of L = (sum of terms)**p
    breaks: tuple[
        tuple[float, float], ...
    ] = ()  # (quantile of tokens, f; below 0 for a law that flattens: c < 0)


CANDIDATES = {
    "chinchilla": Candidate(CHINCHILLA.formula, CHINCHILLA.source, CHINCHILLA, {}),
    "tied": Candidate("E + A / n_params**alpha + B / tokens**alpha", "arXiv:2305.16264", CHINCHILLA, {"beta": "alpha"}),
    "gadre": Candidate(
        "E + (a * M**eta + b * M**-eta) * flops**-eta, M = tokens / n_params: `tied` with eta = alpha / 2, flops = 6 * n_params * tokens",
        "arXiv:2403.08540, eq. 4", CHINCHILLA, {"beta": "alpha"},
    ),
    "power": Candidate("A / n_params**alpha + B / tokens**beta", "no irreducible loss", CHINCHILLA, {"E": 0.0}),
    "kaplan": Candidate(
        "((Nc / n_params)**(aN / aD) + Dc / tokens)**aD", "arXiv:2001.08361, eq. 1.5", CHINCHILLA, {"E": 0.0, "beta": 1.0},
        powers=tuple(np.geomspace(0.03, 0.6, 12)),
    ),
    "interaction": Candidate(INTERACTION.formula, INTERACTION.source, INTERACTION, {}),
    "broken": Candidate(
        BROKEN.formula, BROKEN.source, BROKEN, {}, breaks=tuple((q, f) for f in (0.1, 0.5, -0.1, -0.5) for q in (0.25, 0.5, 0.75)),
    ),
}  # fmt: skip


def compare_forms(runs: pd.DataFrame) -> pd.DataFrame:
    """A table of forms, best first: parameters `k`, robust `scatter` of ln L, `aicc`, and errors of ln L left out by size and one size up.

    runs: columns n_params, tokens, loss. AICc is of Student's t on 4 degrees of freedom, its scale one of the k; `left_out` is the
    median |error| over blocks of sizes held out in turn, `one_size_up` over the largest block.
    """
    n_params, tokens, loss = (
        runs[column].to_numpy(float) for column in ("n_params", "tokens", "loss")
    )
    rows = [
        {"form": name, **_judge(one, n_params, tokens, loss)}
        for name, one in CANDIDATES.items()
        if name != "gadre"
    ]
    return pd.DataFrame(rows).sort_values("aicc", kind="stable").reset_index(drop=True)


def _judge(one: Candidate, n_params: Array, tokens: Array, loss: Array) -> dict[str, Any]:
    """A row of the table."""
    weight = np.vstack([np.ones(len(loss)), folds(n_params)])
    problem, ends = _best(one, n_params, tokens, loss, weight)
    error = [
        np.median(np.abs((problem.ln_loss[0] - problem.ln_model(end[None])[0])[kept == 0]))
        for kept, end in zip(weight[1:], ends[1:], strict=True)
    ]
    return {
        **_likely(one, problem, ends[0]),
        "left_out": float(np.median(error)),
        "one_size_up": float(error[-1]),
    }


def _likely(one: Candidate, problem: Problem, phi: Array) -> dict[str, Any]:
    """Parameters, scale, a break's place and sharpness and an outer power among them; scatter; AICc."""
    scale, deviance = _student(problem, phi)
    k = len(phi) + 1 + (len(one.powers) > 1) + 2 * bool(one.breaks)
    spare = problem.ln_loss.shape[1] - k - 1
    return {
        "k": k,
        "scatter": scale,
        "aicc": deviance + 2 * k + 2 * k * (k + 1) / spare if spare > 0 else math.inf,
    }


def folds(n_params: Array, n: int = FOLDS) -> Array:
    """Row weights (F, R), 0 for what is left out: blocks of whole sizes, as even as sizes allow, the largest last."""
    size = levels(n_params)
    block = np.minimum((np.cumsum(np.bincount(size)) - 1) * n // len(n_params), n - 1)[size]
    return np.array([np.where(block == b, 0.0, 1.0) for b in np.unique(block)])


def _best(
    one: Candidate, n_params: Array, tokens: Array, loss: Array, weight: Array
) -> tuple[Problem, Array]:
    """The problem at the best of the grids, of which those with the best starts are solved, and phi for every row of weights (the first: all rows)."""
    posed = _posed(one, n_params, tokens, loss)
    if len(posed) > SOLVED:
        places = [
            float(problem.objective(starts(problem, SQUARES, exponents, n=1), Huber())[0])
            for problem, exponents in posed
        ]
        posed = [posed[i] for i in np.argsort(places, kind="stable")[:SOLVED]]
    found = (
        [_fitted(problem, exponents, weight[:1]) for problem, exponents in posed]
        if len(posed) > 1
        else [(weight, 0.0)]
    )
    best = int(np.argmin([value for _, value in found]))
    return posed[best][0], _fitted(*posed[best], weight)[0]


def _posed(
    one: Candidate, n_params: Array, tokens: Array, loss: Array
) -> list[tuple[Problem, list[int]]]:
    """The candidate's problems, linear in (ln c, exponents) once the grids' parameters are known. With an outer power p, ln L / p is fitted."""
    columns = {"n_params": n_params, "tokens": tokens}
    bends = [
        {"bend": (1 + (tokens / np.quantile(tokens, q)) ** (1 / abs(f))) ** f}
        for q, f in one.breaks
    ] or [{}]
    posed = []
    for more in bends:
        centre = one.form.centre(columns | more)
        used = shape(one.form, centre, one.fixed)
        exponents = [i for i, column in enumerate(used.columns) if column >= len(one.form.terms)]
        posed += [
            (_outer(pose(one.form, used, columns | more, loss), p), exponents) for p in one.powers
        ]
    return posed


def _outer(problem: Problem, power: float) -> Problem:
    """The problem of L = (sum of terms)**power: terms are on the scale of L**(1 / power), and so is their box."""
    if power == 1:
        return problem
    coefficients, top = problem.high > BOX[1], problem.ln_loss.max() / power + 2.3
    return replace(
        problem,
        power=power,
        low=np.where(coefficients, top - 16.3 / power, problem.low),
        high=np.where(coefficients, top, problem.high),
    )


def _fitted(problem: Problem, exponents: list[int], weight: Array) -> tuple[Array, float]:
    """phi (F, P) at the lowest minima of robust fits under each row of weights, and the first one's objective."""
    places = starts(problem, SQUARES, exponents, n=2)
    batch = replace(problem, weight=np.repeat(weight, len(places), axis=0))
    ends, values = descend(batch, np.tile(places, (len(weight), 1)), Huber(), SPREAD, STEPS)
    best = values.reshape(len(weight), -1).argmin(1)
    return ends.reshape(len(weight), len(places), -1)[np.arange(len(weight)), best], float(
        values[: len(places)].min()
    )


def _student(
    problem: Problem, phi: Array, dof: float = 4.0, rounds: int = 20
) -> tuple[float, float]:
    """Scale of ln L and -2 ln likelihood at the maximum of Student's t, by turns of scale and law from a robust solution (Lange et al. 1989)."""
    here, scale, before = phi[None], 0.0, -1.0
    while rounds and abs(scale - before) > 1e-5 * scale:
        r = (problem.ln_loss - problem.ln_model(here))[0]
        before, scale, rounds = (
            scale,
            max(scale or 1.35 * float(np.median(np.abs(r))), 1e-9),
            rounds - 1,
        )
        for _ in range(20):
            scale = max(
                math.sqrt(float(np.mean((dof + 1) * r**2 / (dof + (r / scale) ** 2)))), 1e-9
            )
        here, value = descend(problem, here, Student(scale, dof), 0.0, STEPS)
    constant = (
        math.lgamma((dof + 1) / 2)
        - math.lgamma(dof / 2)
        - 0.5 * math.log(dof * math.pi)
        - math.log(scale)
    )
    return scale, 2 * (float(value[0]) / scale**2 - len(r) * constant)


def judge_forms(n_params: Array, tokens: Array, loss: Array) -> list[str]:
    """A sentence when another form fits these runs clearly better than the chinchilla form does, and misses sizes left out by less."""
    if not ENOUGH <= len(loss) <= MANY or len(folds(n_params)) < 3:
        return []
    data, alone = (n_params, tokens, loss), np.ones((1, len(loss)))
    found = {
        name: _likely(one, *_first(_best(one, *data, alone)))["aicc"]
        for name, one in CANDIDATES.items()
        if name != "gadre"
    }
    name = min(found, key=lambda key: found[key])
    if not found["chinchilla"] - found[name] > CLEARLY:
        return []
    ours, theirs = (_judge(CANDIDATES[key], *data)["left_out"] for key in ("chinchilla", name))
    if theirs >= ours:
        return []
    gain = f"AICc lower by {found['chinchilla'] - found[name]:.0f}, sizes left out missed by {theirs:.2%} in place of {ours:.2%}"
    return [f"the form {name!r}, {CANDIDATES[name].formula}, fits clearly better: {gain}"]


def _first(best: tuple[Problem, Array]) -> tuple[Problem, Array]:
    return best[0], best[1][0]


def leave_sizes_out(
    n_params: Array, tokens: Array, loss: Array, *, level: float, n_draws: int = 60, **how: Any
) -> dict[str, Any]:
    """The law judged on blocks of sizes it has not seen, one after the other: errors of the loss and the share its intervals cover."""
    if len(folds(n_params)) < 4 or len(loss) < ENOUGH or len(loss) > MANY:
        return {}
    errors, covered = [], []
    for kept in folds(n_params).astype(bool):
        part = {
            key: (value[kept] if isinstance(value, np.ndarray) else value)
            for key, value in how.items()
        }
        if part.get("cluster") is not None:
            part["cluster"] = np.unique(part["cluster"], return_inverse=True)[1]
        solved = solve(n_params[kept], tokens[kept], loss[kept], **part)
        law = solution(solved, CHINCHILLA.natural(draw(solved, n_draws), solved.centre), level)
        found = [
            loss_at(law, level, *at)
            for at in zip(n_params[~kept].tolist(), tokens[~kept].tolist(), strict=True)
        ]
        middle, ends = (
            np.array([said for said, _ in found]),
            np.array([interval for _, interval in found]),
        )
        errors.append(np.abs(middle / loss[~kept] - 1))
        covered.append((ends[:, 0] <= loss[~kept]) & (loss[~kept] <= ends[:, 1]))
    every = np.concatenate(errors)
    return {
        "kind": f"leave-sizes-out, {len(errors)} blocks",
        "cells": [],
        "median_loss_error": float(np.median(every)),
        "worst_loss_error": float(every.max()),
        "loss_coverage": float(np.concatenate(covered).mean()),
        "one_size_up_error": float(np.median(errors[-1])),
    }
