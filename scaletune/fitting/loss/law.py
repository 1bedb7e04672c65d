"""Fits the loss law E + A / n_params**alpha + B / tokens**beta, in nats/token.

The form is that of arXiv:2203.15556, eq. 2. There are two estimators. DESCRIBE is the published
objective: the sum of Huber(1e-3) over residuals of ln L. (The mean instead of the sum stops the
solver early and changed the published constants: arXiv:2404.10102.) PREDICT extrapolates best to
the next larger size on public sweeps: the same cost, row weights that grow with compute, a prior
on the exponents, and a correction near the runs (discrepancy.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.fitting.loss.functional_forms import CHINCHILLA, Shape, build_problem, make_shape
from scaletune.fitting.loss.identifiability import Unmeasured, find_unmeasured
from scaletune.fitting.loss.noise import few_run_noise, residual_noise
from scaletune.fitting.loss.published import published_prior
from scaletune.fitting.loss.variable_projection import Problem, descend, starts
from scaletune.fitting.stats import resampling
from scaletune.fitting.stats.robust import Huber, Loss

NAMES = CHINCHILLA.names
# Rows (or runs) from which pairs are resampled. With fewer, a resample can lose a whole scale, so
# noise is resampled instead.
PAIRS_FROM = 20
SPREAD = 0.02  # of ln L around a start: the width of the first cost
# Newton steps in a resample of few rows: if they identify fewer parameters than the law has, the
# solver moves slowly along a valley.
NEWTON_STEPS = 40
TIED = {"beta": "alpha"}
MAX_DIFFERENCE = 0.1  # of alpha and beta, in the draws of a fit that sets them equal
# Above LARGE rows, SAMPLE of them give the start, and a resample takes LARGE_STEPS Newton steps.
LARGE, SAMPLE, LARGE_STEPS = 10_000, 4_000, 3

Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Estimator:
    """The cost, weights and prior of a fit of the loss law."""

    cost: Loss = Huber()  # noqa: RUF009 (frozen)
    """Cost of a residual."""

    weight_power: float = 0.0
    """Row weights are (n_params * tokens)**weight_power."""

    prior: tuple[float, float] | None = None
    """Mean and sd of a normal prior on the free exponents."""

    linear_residuals: bool = False
    """Use residuals of L instead of ln L."""

    use_discrepancy: bool = False
    """Correct predictions by the residuals of near runs (discrepancy.py)."""


DESCRIBE = Estimator()
PREDICT = Estimator(weight_power=0.25, prior=(0.36, 0.1), use_discrepancy=True)
ESTIMATORS = {"chinchilla": DESCRIBE, "loss_nd": PREDICT}


@dataclass(frozen=True)
class LossSolution:
    """A fitted loss law."""

    problem: Problem
    shape: Shape
    estimator: Estimator

    centre: Array
    """(3, 2): maps exponents to ln coefficients at one parameter and one token."""

    phi: Array
    """(P): the free parameters."""

    objective: float
    """Cost of the residuals, without the prior."""

    noise: tuple[float, int]
    """sd of ln L around the law, and its degrees of freedom."""

    cluster: Index
    """(R): number of the run of each row."""

    prior_covariance: Array
    """(P, P): covariance of the prior on phi; zeros where it has none."""

    unmeasured: Unmeasured | None = None
    """What the law takes from published laws."""

    @property
    def parameters(self) -> Array:
        return self.problem.parameters(self.phi[None])

    @property
    def vector(self) -> Array:
        """(E, A, B, alpha, beta) at one parameter and one token."""
        return CHINCHILLA.natural(self.parameters, self.centre)[0]

    @property
    def residuals(self) -> Array:
        return (self.problem.ln_loss - self.problem.ln_model(self.phi[None]))[0]

    @property
    def exponents(self) -> list[int]:
        return exponent_coordinates(self.shape)


def exponent_coordinates(shape: Shape) -> list[int]:
    """Indices of the coordinates of phi that are exponents."""
    return [i for i, column in enumerate(shape.columns) if column >= len(CHINCHILLA.terms)]


def solve(
    n_params: Array,
    tokens: Array,
    loss: Array,
    se: Array | None = None,
    *,
    estimator: Estimator = DESCRIBE,
    fixed: Mapping[str, float | str] | None = None,
    weight: Array | None = None,
    cluster: Index | None = None,
) -> LossSolution:
    """Fits the loss law; starting points are found on a grid of exponents.

    Args:
        n_params: (R) non-embedding parameters.
        tokens: (R) tokens.
        loss: (R) losses, or minimum losses, in nats/token.
        se: (R) standard errors of minimum losses.
        estimator: Cost, weights and prior.
        fixed: Parameter name -> value, or the name of the exponent that it equals.
        weight: (R) row weights.
        cluster: (R) number of the run of each row; by default every row is a run.
    """
    _require_above_minimum_loss(loss, fixed)
    columns = {"n_params": n_params, "tokens": tokens}
    centre = CHINCHILLA.centre(columns)
    unmeasured = find_unmeasured(n_params, tokens, fixed)
    is_tied = unmeasured is not None and unmeasured.is_tied
    used = make_shape(CHINCHILLA, centre, TIED if is_tied else fixed)
    rows = np.ones(len(loss)) if weight is None else weight
    weights = rows * (n_params * tokens / (n_params * tokens).max()) ** estimator.weight_power
    problem = build_problem(CHINCHILLA, used, columns, loss, weights)
    phi, _ = minimize(problem, used, estimator.cost)
    relative_se = None if se is None else se / loss
    noise = residual_noise(problem, phi, relative_se)
    prior_mean, covariance = _prior(estimator, used, problem, centre, unmeasured)
    if unmeasured and not is_tied:
        noise = few_run_noise(problem, prior_mean, covariance, relative_se)
    if covariance.any():
        precision: Array = np.linalg.pinv(covariance).astype(float) * _cost_per_nat(
            estimator.cost, noise[0]
        )
        problem = replace(problem, prior=(prior_mean, precision))
        phi, _ = minimize(problem, used, estimator.cost, phi, prior_mean)
    if estimator.linear_residuals:
        problem, phi = _fit_linear_residuals(problem, phi, loss, estimator.cost)
    value = float(replace(problem, prior=None).objective(phi[None], estimator.cost)[0])
    if cluster is None:
        cluster = np.arange(len(loss), dtype=np.intp)
    return LossSolution(
        problem, used, estimator, centre, phi, value, noise, cluster, covariance, unmeasured
    )


def _require_above_minimum_loss(loss: Array, fixed: Mapping[str, float | str] | None) -> None:
    minimum = (fixed or {}).get("E", 0.0)
    if not isinstance(minimum, str) and loss.min() <= minimum:
        below = int((loss <= minimum).sum())
        raise UserError(
            f"every loss must be above the fixed irreducible loss E = {minimum:g}, "
            f"but {below} of {len(loss)} are not: the lowest is {loss.min():g}"
        )


def minimize(problem: Problem, used: Shape, cost: Loss, *others: Array) -> tuple[Array, float]:
    """phi (P) and objective at the lowest minimum.

    Starts are the best places of the profile over exponents (`starts`), and `others`. Of more than
    LARGE rows, a sample gives the start.
    """
    if problem.ln_loss.shape[1] > LARGE:
        places, spread = np.vstack([*others, minimize(problem.sample(SAMPLE), used, cost)[0]]), 0.0
    else:
        places = np.vstack([*others, starts(problem, cost, exponent_coordinates(used))])
        spread = SPREAD
    ends, values = descend(problem, places, cost, spread)
    best = int(np.argmin(values))
    return ends[best], float(values[best])


def _fit_linear_residuals(
    problem: Problem, phi: Array, loss: Array, cost: Loss, rounds: int = 50
) -> tuple[Problem, Array]:
    """The problem and its solution for residuals of L instead of ln L.

    A fixed-point iteration: residuals of ln L get weights L**2 and are replaced by those of L.
    """
    linearized, weight = problem, problem.weight
    for _ in range(rounds):
        ln_model = problem.ln_model(phi[None])
        linearized = replace(
            problem,
            ln_loss=ln_model + loss * np.exp(-ln_model) - 1,
            weight=weight * np.exp(2 * ln_model),
        )
        before, phi = phi, descend(linearized, phi[None], cost, 0.0)[0][0]
        if np.abs(phi - before).max() <= 1e-12:
            break
    return linearized, phi


def _prior(
    estimator: Estimator,
    used: Shape,
    problem: Problem,
    centre: Array,
    unmeasured: Unmeasured | None,
) -> tuple[Array, Array]:
    """Mean (P) and covariance (P, P) of the prior on phi; zeros where there is none.

    It is that of published laws if the runs do not identify the law, else the estimator's.
    """
    if unmeasured and not unmeasured.is_tied:
        ln_loss = float(np.average(problem.ln_loss[0], weights=problem.weight[0]))
        prior = published_prior(centre[1, 0], centre[2, 1], ln_loss)
        return prior.on(used.base, used.free)
    free = np.array([float(i in exponent_coordinates(used)) for i in range(len(used.columns))])
    mean, sd = estimator.prior or (0.0, 0.0)
    return free * mean, np.diag(free * sd**2)


def _cost_per_nat(cost: Loss, sd: float) -> float:
    """The cost divided by this, E psi**2 / E psi', weighs as much as -ln of a density."""
    return sd**2 if not isinstance(cost, Huber) else sd * min(1.25 * cost.delta, sd)


def draw(solved: LossSolution, n: int, kind: str = "auto", seed: int = 2203) -> Array:
    """Parameters (n, 5) of refits to n resamples.

    Args:
        solved: The fitted law.
        n: Number of resamples.
        kind: "pairs" resamples whole runs, "blocks" resamples blocks of a run's checkpoints,
            "noise" draws losses around the law, "auto" is "pairs" if there are PAIRS_FROM runs,
            else "noise".
        seed: Seed of the random numbers.

    The mean of the prior is drawn from the prior, and the difference of exponents that were set
    equal for lack of data from its range, so that the draws include their uncertainty.
    """
    rng, problem = np.random.default_rng([seed, 15556]), solved.problem
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
        base=_draw_base(rng, solved, n),
        prior=_draw_prior(rng, solved, n),
    )
    return refit(solved, drawn, several=kind == "noise")


def _blocks(rng: np.random.Generator, n: int, solved: LossSolution) -> Array:
    """Blocks as long as the cube root of a run's checkpoints (Hall, Horowitz & Jing 1995)."""
    tokens = -solved.problem.terms[2].features[:, 1]  # centred ln
    length = max(round(np.bincount(solved.cluster).mean() ** (1 / 3)), 1)
    return resampling.blocks(rng, n, solved.cluster, tokens, length)


def refit(solved: LossSolution, drawn: Problem, several: bool = False) -> Array:
    """Parameters (K, 5) of resampled problems, solved from the solution of the original one.

    With `several`, from other starts too: a problem with few rows can have several minima, and the
    lowest counts. A resample of more than LARGE rows is a few Newton steps away.
    """
    n = len(drawn.weight)
    cost, exponents = solved.estimator.cost, solved.exponents
    more = [starts(solved.problem, cost, exponents, n=2)] if several else []
    places = np.vstack([solved.phi[None], *more])
    rounds, spread = NEWTON_STEPS if several else 200, SPREAD / 4
    if drawn.ln_loss.shape[1] > LARGE:
        rounds, spread = LARGE_STEPS, 0.0
    results = [
        descend(drawn, np.repeat(place[None], n, axis=0), cost, spread, rounds) for place in places
    ]
    ends, values = zip(*results, strict=True)
    best = np.stack(ends)[np.argmin(values, axis=0), np.arange(n)]
    return drawn.parameters(best)


def _draw_base(rng: np.random.Generator, solved: LossSolution, n: int) -> Array:
    """Base parameters (n, 5)."""
    base = np.tile(solved.shape.base, (n, 1))
    if solved.unmeasured and solved.unmeasured.is_tied:
        base[:, 4] = rng.uniform(-MAX_DIFFERENCE, MAX_DIFFERENCE, size=n)
    return base


def _draw_prior(
    rng: np.random.Generator, solved: LossSolution, n: int
) -> tuple[Array, Array] | None:
    prior = solved.problem.prior
    if prior is None:
        return None
    size, basis = np.linalg.eigh(solved.prior_covariance)
    root = basis * np.sqrt(np.maximum(size, 0.0))
    return prior[0] + rng.standard_normal((n, len(prior[0]))) @ root.T, prior[1]
