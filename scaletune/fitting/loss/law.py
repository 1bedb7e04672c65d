"""The loss law, E + A / n_params**alpha + B / tokens**beta in nats/token (arXiv:2203.15556, eq. 2), fitted robustly and resampled.

Two estimators of one form. DESCRIBE is the published objective: the SUM of Huber(1e-3) over residuals of ln L (arXiv:2404.10102:
averaging it instead stops the solver early and moved the published constants). PREDICT is what extrapolated one size up best on
public sweeps: the same cost, weights that grow with compute, exponents drawn towards what the field has found, and what near runs
show the law to miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.fitting.loss.functional_forms import CHINCHILLA, Shape, pose, shape
from scaletune.fitting.loss.identifiability import ASSUMED, TIED, choose
from scaletune.fitting.loss.variable_projection import Problem, descend, starts
from scaletune.fitting.stats import resampling
from scaletune.fitting.stats.robust import Huber, Loss

NAMES = CHINCHILLA.names
PAIRS_FROM = 20  # rows (or runs) from which they are resampled in pairs; below it resamples lose whole scales, and noise is resampled instead
SPREAD = 0.02  # of ln L about a start: how wide the cost is at first
FEW_STEPS = 40  # of Newton in a resample of few rows: those that identify less than the law's parameters creep along a valley

Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Estimator:
    """How residuals of ln L count: their cost, row weights (n_params * tokens)**lean, and a normal prior (mean, sd) on free exponents."""

    cost: Loss = Huber()  # noqa: RUF009 (frozen)
    lean: float = 0.0
    prior: tuple[float, float] | None = None
    linear: bool = False  # residuals of L itself, not of ln L
    near: bool = False  # predictions add what near runs show the law to miss (discrepancy.py)


DESCRIBE = Estimator()
PREDICT = Estimator(lean=0.25, prior=(0.36, 0.1), near=True)
ESTIMATORS = {"chinchilla": DESCRIBE, "loss_nd": PREDICT}


@dataclass(frozen=True)
class Solved:
    """A fitted law: the problem as posed, its solution, residuals of ln L, and how the law's centre maps to one parameter and one token."""

    problem: Problem
    shape: Shape
    estimator: Estimator
    centre: Array
    phi: Array  # (P)
    objective: float  # without the prior's part
    noise: tuple[float, int]  # sd of ln L about the law, degrees of freedom
    cluster: Index

    @property
    def parameters(self) -> Array:
        return self.problem.parameters(self.phi[None])

    @property
    def vector(self) -> Array:
        """(E, A, B, alpha, beta)."""
        return CHINCHILLA.natural(self.parameters, self.centre)[0]

    @property
    def residuals(self) -> Array:
        return (self.problem.ln_loss - self.problem.ln_model(self.phi[None]))[0]

    @property
    def exponents(self) -> list[int]:
        return exponents(self.shape)


def exponents(shape: Shape) -> list[int]:
    """Which coordinates of phi are exponents."""
    return [i for i, column in enumerate(shape.columns) if column >= len(CHINCHILLA.terms)]


def solve(
    n_params: Array, tokens: Array, loss: Array, se: Array | None = None, *, estimator: Estimator = DESCRIBE,
    fixed: Mapping[str, float | str] | None = None, weight: Array | None = None, cluster: Index | None = None,
) -> Solved:  # fmt: skip
    """The law through losses (or floors with standard error `se`), from no start of the user's; `fixed`: name -> value, or an exponent's equal."""
    _above_floor(loss, fixed)
    columns = {"n_params": n_params, "tokens": tokens}
    centre = CHINCHILLA.centre(columns)
    used = shape(CHINCHILLA, centre, fixed) if fixed else choose(n_params, tokens)
    rows = np.ones(len(loss)) if weight is None else weight
    leaning = rows * (n_params * tokens / (n_params * tokens).max()) ** estimator.lean
    problem = pose(CHINCHILLA, used, columns, loss, leaning)
    phi, _ = lowest(problem, used, estimator.cost)
    noise = _noise(problem, phi, None if se is None else se / loss)
    if estimator.prior and exponents(used):
        problem = replace(problem, prior=_prior(estimator, used, noise[0]))
        phi, _ = lowest(problem, used, estimator.cost, phi)
    if estimator.linear:
        problem, phi = _of_loss(problem, phi, loss, estimator.cost)
    value = float(replace(problem, prior=None).objective(phi[None], estimator.cost)[0])
    alone = np.arange(len(loss), dtype=np.intp)
    return Solved(
        problem, used, estimator, centre, phi, value, noise, alone if cluster is None else cluster
    )


def _above_floor(loss: Array, fixed: Mapping[str, float | str] | None) -> None:
    floor = (fixed or {}).get("E", 0.0)
    if not isinstance(floor, str) and loss.min() <= floor:
        below = int((loss <= floor).sum())
        raise UserError(
            f"every loss must lie above the fixed floor E = {floor:g}, but {below} of {len(loss)} do not: the lowest is {loss.min():g}"
        )


def lowest(problem: Problem, used: Shape, cost: Loss, *others: Array) -> tuple[Array, float]:
    """phi (P) and objective at the lowest of the minima that the profile over exponents, and `others`, lead to."""
    ends, values = descend(
        problem, np.vstack([*others, starts(problem, cost, exponents(used))]), cost, SPREAD
    )
    best = int(np.argmin(values))
    return ends[best], float(values[best])


def _of_loss(
    problem: Problem, phi: Array, loss: Array, cost: Loss, rounds: int = 50
) -> tuple[Problem, Array]:
    """The problem whose solution is that for residuals of L: of ln L, weighted by L**2, with the residual that L has; by fixed point."""
    posed, weight = problem, problem.weight
    for _ in range(rounds):
        ln_model = problem.ln_model(phi[None])
        posed = replace(
            problem,
            ln_loss=ln_model + loss * np.exp(-ln_model) - 1,
            weight=weight * np.exp(2 * ln_model),
        )
        before, phi = phi, descend(posed, phi[None], cost, 0.0)[0][0]
        if np.abs(phi - before).max() <= 1e-12:
            break
    return posed, phi


def _prior(estimator: Estimator, used: Shape, sd: float) -> tuple[Array, Array]:
    """Normal prior on the free exponents: a cost of r weighs as much as ln of a density when divided by `slope` (E psi**2 / E psi')."""
    mean, spread = estimator.prior or (0.0, 1.0)
    slope = (
        sd**2
        if not isinstance(estimator.cost, Huber)
        else sd * min(1.25 * estimator.cost.delta, sd)
    )
    on = np.array([float(i in exponents(used)) for i in range(len(used.columns))])
    return on * mean, np.diag(on * slope / spread**2)


def _noise(problem: Problem, phi: Array, se: Array | None) -> tuple[float, int]:
    """sd of ln L about the law, at least what the floors' own errors are, and its degrees of freedom."""
    dof = problem.ln_loss.shape[1] - len(phi)
    own = float(np.sqrt(np.mean(se**2))) if se is not None else 0.0
    if dof < 1:
        return max(own, 2e-3), 0
    r = (problem.ln_loss - problem.ln_model(phi[None]))[0]
    return max(float(np.sqrt(r @ r / dof)), own), dof


def draw(solved: Solved, n: int, kind: str = "auto", seed: int = 2203) -> Array:
    """Parameters (n, 5) of refits to resamples: "pairs" (of whole clusters), "blocks" of a run's checkpoints, "noise" about the law;
    "auto": pairs where there are enough, else noise.

    Exponents that were assumed are drawn from their range, the prior's mean from the prior: what they leave open shows in the draws.
    """
    rng, used, problem = np.random.default_rng([seed, 15556]), solved.shape, solved.problem
    if kind == "auto":
        kind = "pairs" if len(np.unique(solved.cluster)) >= PAIRS_FROM else "noise"
    weight, ln_loss = np.repeat(problem.weight, n, axis=0), np.repeat(problem.ln_loss, n, axis=0)
    if kind == "noise":
        ln_loss = resampling.noise(
            rng,
            n,
            problem.ln_model(solved.phi[None])[0],
            solved.residuals,
            *solved.noise,
            solved.cluster,
        )
    else:
        weight = weight * (
            resampling.pairs(rng, n, solved.cluster) if kind == "pairs" else _blocks(rng, n, solved)
        )
    drawn = replace(
        problem,
        ln_loss=ln_loss,
        weight=weight,
        base=_assumed(rng, used, n),
        prior=_drawn_prior(rng, solved, n),
    )
    return refit(solved, drawn, several=kind == "noise")


def _blocks(rng: np.random.Generator, n: int, solved: Solved) -> Array:
    """Blocks as long as the cube root of a run's checkpoints (Hall, Horowitz & Jing 1995)."""
    tokens = -solved.problem.terms[2].features[:, 1]  # centred ln
    return resampling.blocks(
        rng, n, solved.cluster, tokens, max(round(np.bincount(solved.cluster).mean() ** (1 / 3)), 1)
    )


def refit(solved: Solved, drawn: Problem, several: bool = False) -> Array:
    """Parameters (K, 5) of `drawn` problems, from the solution; few rows may have several minima: then from `several` places, the lowest counts."""
    n = len(drawn.weight)
    places = np.vstack(
        [
            solved.phi[None],
            *(
                [starts(solved.problem, solved.estimator.cost, solved.exponents, n=2)]
                if several
                else []
            ),
        ]
    )
    rounds = FEW_STEPS if several else 200
    ends, values = zip(
        *(
            descend(
                drawn, np.repeat(place[None], n, axis=0), solved.estimator.cost, SPREAD / 4, rounds
            )
            for place in places
        ),
        strict=True,
    )
    best = np.stack(ends)[np.argmin(values, axis=0), np.arange(n)]
    return drawn.parameters(best)


def _assumed(rng: np.random.Generator, used: Shape, n: int) -> Array:
    base = np.tile(used.base, (n, 1))
    if not used.said:  # fixed by the user, or all free
        return base
    for i in (3, 4):
        if not used.free[i].any():
            base[:, i] = rng.uniform(*ASSUMED, size=n)
    if used.free[3] @ used.free[4]:
        base[:, 4] = rng.uniform(-TIED, TIED, size=n)
    return base


def _drawn_prior(rng: np.random.Generator, solved: Solved, n: int) -> tuple[Array, Array] | None:
    prior = solved.problem.prior
    if prior is None or solved.estimator.prior is None:
        return None
    return prior[0] + (np.diag(prior[1]) > 0) * solved.estimator.prior[1] * rng.standard_normal(
        (n, len(prior[0]))
    ), prior[1]
