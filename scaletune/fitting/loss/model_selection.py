"""Compares functional forms of the loss law, and tests a law on sizes that were left out.

All refits are solved in one batch: rows that are left out get weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.fitting.loss.functional_forms import (
    BROKEN,
    CHINCHILLA,
    EXPONENT_BOUNDS,
    INTERACTION,
    FunctionalForm,
    build_problem,
    make_shape,
)
from scaletune.fitting.loss.law import SPREAD, draw, solve
from scaletune.fitting.loss.record import solution
from scaletune.fitting.loss.variable_projection import Problem, descend, starts
from scaletune.fitting.stats.robust import SQUARES, Huber, Student
from scaletune.fitting.table import levels
from scaletune.predicting import loss_at

FOLDS = 6
STEPS = 50  # Newton steps: forms with parameters that are not identified converge slowly
N_SOLVED = 3  # grid points of a candidate that are solved, of those whose starts are compared
MIN_AICC_GAIN = 10.0  # AICc gain from which another form fits better (Burnham & Anderson 2002)
MIN_RUNS = 12  # runs from which forms are compared
# Runs above which a fit neither compares forms nor cross-validates, so that it takes under a
# second; `compare_forms` still compares them.
MAX_RUNS = 500

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A form with fixed parameters, and grids of its parameters that are not exponents."""

    formula: str
    source: str
    form: FunctionalForm
    fixed: Mapping[str, float | str]

    powers: tuple[float, ...] = (1.0,)
    """Values of p in L = (sum of terms)**p."""

    breaks: tuple[tuple[float, float], ...] = ()
    """(quantile of tokens, sharpness f) of a break; f < 0 for a law that flattens, c < 0."""


CANDIDATES = {
    "chinchilla": Candidate(CHINCHILLA.formula, CHINCHILLA.source, CHINCHILLA, {}),
    "tied": Candidate(
        "E + A / n_params**alpha + B / tokens**alpha",
        "arXiv:2305.16264",
        CHINCHILLA,
        {"beta": "alpha"},
    ),
    "gadre": Candidate(
        "E + (a * M**eta + b * M**-eta) * flops**-eta, M = tokens / n_params: `tied` with "
        "eta = alpha / 2, flops = 6 * n_params * tokens",
        "arXiv:2403.08540, eq. 4",
        CHINCHILLA,
        {"beta": "alpha"},
    ),
    "power": Candidate(
        "A / n_params**alpha + B / tokens**beta", "no irreducible loss", CHINCHILLA, {"E": 0.0}
    ),
    "kaplan": Candidate(
        "((Nc / n_params)**(aN / aD) + Dc / tokens)**aD",
        "arXiv:2001.08361, eq. 1.5",
        CHINCHILLA,
        {"E": 0.0, "beta": 1.0},
        powers=tuple(np.geomspace(0.03, 0.6, 12)),
    ),
    "interaction": Candidate(INTERACTION.formula, INTERACTION.source, INTERACTION, {}),
    "broken": Candidate(
        BROKEN.formula,
        BROKEN.source,
        BROKEN,
        {},
        breaks=tuple((q, f) for f in (0.1, 0.5, -0.1, -0.5) for q in (0.25, 0.5, 0.75)),
    ),
}
COMPARED = [name for name in CANDIDATES if name != "gadre"]  # "gadre" is "tied" by another name


def compare_forms(runs: pd.DataFrame) -> pd.DataFrame:
    """Ranks functional forms of the loss law by how well they fit.

    Args:
        runs: One row per run, with columns `n_params`, `tokens` and `loss` (nats/token).

    Returns:
        One row per form, the best first. `k`: number of parameters, the scale included. `scatter`:
        robust scale of the residuals of ln L. `aicc`: AICc for Student's t with 4 degrees of
        freedom. `left_out`: median absolute error of ln L over blocks of sizes that are held out in
        turn. `one_size_up`: the same for the block of the largest sizes.
    """
    n_params, tokens, loss = (
        runs[column].to_numpy(float) for column in ("n_params", "tokens", "loss")
    )
    rows = [
        {"form": name, **_score_form(CANDIDATES[name], n_params, tokens, loss)} for name in COMPARED
    ]
    return pd.DataFrame(rows).sort_values("aicc", kind="stable").reset_index(drop=True)


def _score_form(one: Candidate, n_params: Array, tokens: Array, loss: Array) -> dict[str, Any]:
    """AICc and held-out errors of a form."""
    weight = np.vstack([np.ones(len(loss)), size_folds(n_params)])
    problem, ends = _fit_form(one, n_params, tokens, loss, weight)
    error = [
        np.median(np.abs((problem.ln_loss[0] - problem.ln_model(end[None])[0])[kept == 0]))
        for kept, end in zip(weight[1:], ends[1:], strict=True)
    ]
    return {
        **_likelihood_score(one, problem, ends[0]),
        "left_out": float(np.median(error)),
        "one_size_up": float(error[-1]),
    }


def _likelihood_score(one: Candidate, problem: Problem, phi: Array) -> dict[str, Any]:
    """Number of parameters, scatter and AICc.

    The parameters include the scale, an outer power, and the position and sharpness of a break.
    """
    scale, deviance = _fit_student(problem, phi)
    k = len(phi) + 1 + (len(one.powers) > 1) + 2 * bool(one.breaks)
    spare = problem.ln_loss.shape[1] - k - 1
    return {
        "k": k,
        "scatter": scale,
        "aicc": deviance + 2 * k + 2 * k * (k + 1) / spare if spare > 0 else math.inf,
    }


def size_folds(n_params: Array, n: int = FOLDS) -> Array:
    """Row weights (F, R), 0 for the rows of one block of sizes and 1 for the others.

    Blocks have whole sizes and similar numbers of rows; the largest sizes are the last block.
    """
    size = levels(n_params)
    block = np.minimum((np.cumsum(np.bincount(size)) - 1) * n // len(n_params), n - 1)[size]
    return np.array([np.where(block == b, 0.0, 1.0) for b in np.unique(block)])


def _fit_form(
    one: Candidate, n_params: Array, tokens: Array, loss: Array, weight: Array
) -> tuple[Problem, Array]:
    """The problem at the best grid point, and phi for every row of weights.

    The grid point is chosen with the first weights (all rows). Only the N_SOLVED points with the
    best starts are solved.
    """
    problems = _build_problems(one, n_params, tokens, loss)
    if len(problems) > N_SOLVED:
        costs = [
            float(problem.objective(starts(problem, SQUARES, exponents, n=1), Huber())[0])
            for problem, exponents in problems
        ]
        problems = [problems[i] for i in np.argsort(costs, kind="stable")[:N_SOLVED]]
    best = 0
    if len(problems) > 1:
        objectives = [_fit_folds(*problem, weight[:1])[1] for problem in problems]
        best = int(np.argmin(objectives))
    return problems[best][0], _fit_folds(*problems[best], weight)[0]


def _build_problems(
    one: Candidate, n_params: Array, tokens: Array, loss: Array
) -> list[tuple[Problem, list[int]]]:
    """A problem, with the coordinates that are exponents, for each point of the candidate's grids.

    With an outer power p, the fitted quantity is ln L / p.
    """
    columns = {"n_params": n_params, "tokens": tokens}
    bends = [
        {"bend": (1 + (tokens / np.quantile(tokens, q)) ** (1 / abs(f))) ** f}
        for q, f in one.breaks
    ] or [{}]
    problems = []
    for bend in bends:
        centre = one.form.centre(columns | bend)
        used = make_shape(one.form, centre, one.fixed)
        exponents = [i for i, column in enumerate(used.columns) if column >= len(one.form.terms)]
        problem = build_problem(one.form, used, columns | bend, loss)
        problems += [(_with_power(problem, p), exponents) for p in one.powers]
    return problems


def _with_power(problem: Problem, power: float) -> Problem:
    """The problem of L = (sum of terms)**power; terms and their bounds scale as L**(1 / power)."""
    if power == 1:
        return problem
    coefficients, top = problem.high > EXPONENT_BOUNDS[1], problem.ln_loss.max() / power + 2.3
    return replace(
        problem,
        power=power,
        low=np.where(coefficients, top - 16.3 / power, problem.low),
        high=np.where(coefficients, top, problem.high),
    )


def _fit_folds(problem: Problem, exponents: list[int], weight: Array) -> tuple[Array, float]:
    """phi (F, P) at the lowest minimum for each row of weights, and the objective of the first."""
    places = starts(problem, SQUARES, exponents, n=2)
    batch = replace(problem, weight=np.repeat(weight, len(places), axis=0))
    ends, values = descend(batch, np.tile(places, (len(weight), 1)), Huber(), SPREAD, STEPS)
    best = values.reshape(len(weight), -1).argmin(1)
    phi = ends.reshape(len(weight), len(places), -1)[np.arange(len(weight)), best]
    return phi, float(values[: len(places)].min())


def _fit_student(
    problem: Problem, phi: Array, dof: float = 4.0, rounds: int = 20
) -> tuple[float, float]:
    """Scale of the residuals of ln L and -2 ln likelihood at the maximum of Student's t.

    Scale and law are optimized in turns, from a robust solution (Lange et al. 1989).
    """
    here, scale, before = phi[None], 0.0, -1.0
    while rounds and abs(scale - before) > 1e-5 * scale:
        r = (problem.ln_loss - problem.ln_model(here))[0]
        before = scale
        scale = max(scale or 1.35 * float(np.median(np.abs(r))), 1e-9)
        rounds -= 1
        for _ in range(20):
            variance = float(np.mean((dof + 1) * r**2 / (dof + (r / scale) ** 2)))
            scale = max(math.sqrt(variance), 1e-9)
        here, value = descend(problem, here, Student(scale, dof), 0.0, STEPS)
    constant = (
        math.lgamma((dof + 1) / 2)
        - math.lgamma(dof / 2)
        - 0.5 * math.log(dof * math.pi)
        - math.log(scale)
    )
    return scale, 2 * (float(value[0]) / scale**2 - len(r) * constant)


def better_form(n_params: Array, tokens: Array, loss: Array) -> list[str]:
    """A warning if another form fits clearly better and predicts held-out sizes better."""
    if not MIN_RUNS <= len(loss) <= MAX_RUNS or len(size_folds(n_params)) < 3:
        return []
    data, all_rows = (n_params, tokens, loss), np.ones((1, len(loss)))
    aicc = {
        name: _likelihood_score(
            CANDIDATES[name], *_full_fit(_fit_form(CANDIDATES[name], *data, all_rows))
        )["aicc"]
        for name in COMPARED
    }
    name = min(aicc, key=lambda key: aicc[key])
    if not aicc["chinchilla"] - aicc[name] > MIN_AICC_GAIN:
        return []
    ours, theirs = (_score_form(CANDIDATES[key], *data)["left_out"] for key in ("chinchilla", name))
    if theirs >= ours:
        return []
    return [
        f"the form {name!r}, {CANDIDATES[name].formula}, fits clearly better: AICc lower by "
        f"{aicc['chinchilla'] - aicc[name]:.0f}, median error on held-out sizes {theirs:.2%} "
        f"instead of {ours:.2%}"
    ]


def _full_fit(best: tuple[Problem, Array]) -> tuple[Problem, Array]:
    return best[0], best[1][0]


def leave_sizes_out(
    n_params: Array, tokens: Array, loss: Array, *, level: float, n_draws: int = 60, **how: Any
) -> dict[str, Any]:
    """Predicts blocks of sizes from the others, one block after the other: the `Fit.held_out`.

    Empty if there are too few sizes, or too few or too many runs.
    """
    if len(size_folds(n_params)) < 4 or len(loss) < MIN_RUNS or len(loss) > MAX_RUNS:
        return {}
    errors, covered = [], []
    for kept in size_folds(n_params).astype(bool):
        part = {
            key: (value[kept] if isinstance(value, np.ndarray) else value)
            for key, value in how.items()
        }
        if part.get("cluster") is not None:
            part["cluster"] = np.unique(part["cluster"], return_inverse=True)[1]
        solved = solve(n_params[kept], tokens[kept], loss[kept], **part)
        law = solution(solved, CHINCHILLA.natural(draw(solved, n_draws), solved.centre), level)
        unseen = zip(n_params[~kept].tolist(), tokens[~kept].tolist(), strict=True)
        values, intervals = zip(*(loss_at(law, level, *at) for at in unseen), strict=True)
        predicted, ends = np.array(values), np.array(intervals)
        errors.append(np.abs(predicted / loss[~kept] - 1))
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
