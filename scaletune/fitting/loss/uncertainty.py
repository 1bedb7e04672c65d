"""Uncertainty of a fitted loss law without resampling: sandwich covariance, profile likelihood."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError, nearest
from scaletune.fitting.loss.functional_forms import CHINCHILLA, make_shape
from scaletune.fitting.loss.law import NAMES, SPREAD, LossSolution
from scaletune.fitting.loss.variable_projection import descend, starts

Array = NDArray[np.float64]


def covariance(solved: LossSolution) -> Array:
    """Covariance of (ln E, ln A, ln B, alpha, beta) at one parameter and one token.

    A sandwich: inverse curvature, variance of the scores by cluster, inverse curvature. The second
    derivative of the cost is a mean over a bandwidth: that of Huber's cost is 0 or 1, so that few
    rows would decide (Koenker 2005, 3.4.2).
    """
    score = (solved.problem.weight[0] * _cost_slopes(solved)[0])[:, None] * _jacobian(solved)
    middle = np.zeros((int(solved.cluster.max()) + 1, score.shape[1]))
    np.add.at(middle, solved.cluster, score)
    small = len(middle) / max(len(middle) - len(solved.phi), 1)
    out = _to_origin(solved) @ _inverse_curvature(solved)
    return small * out @ middle.T @ middle @ out.T


def influence(solved: LossSolution) -> tuple[Array, Array]:
    """Derivatives to the ln loss of each row (5, R), and d ln L / d phi (R, P).

    The first are those of (ln E, ln A, ln B, alpha, beta) at one parameter and one token.
    """
    jacobian = _jacobian(solved)
    pull = jacobian * (solved.problem.weight[0] * _cost_slopes(solved)[1])[:, None]
    return _to_origin(solved) @ _inverse_curvature(solved) @ pull.T, jacobian


def _inverse_curvature(solved: LossSolution) -> Array:
    """Inverse curvature of the objective (P, P)."""
    problem, jacobian = solved.problem, _jacobian(solved)
    prior = 0.0 if problem.prior is None else problem.prior[1]
    curvature = problem.weight[0] * _cost_slopes(solved)[1]
    return np.linalg.pinv(jacobian.T @ (jacobian * curvature[:, None]) + prior)


def _to_origin(solved: LossSolution) -> Array:
    """(5, P): maps phi to the parameters at one parameter and one token."""
    to_origin = np.eye(len(NAMES))
    to_origin[: len(CHINCHILLA.terms), len(CHINCHILLA.terms) :] = solved.centre
    return to_origin @ solved.shape.free


def _cost_slopes(solved: LossSolution) -> tuple[Array, Array]:
    """First and smoothed second derivative of the cost at the residuals."""
    r, cost = solved.residuals, solved.estimator.cost
    width = 1.06 * 1.4826 * float(np.median(np.abs(r))) * len(r) ** -0.2 + 1e-12
    return cost.slope(r)[0], (cost.slope(r + width)[0] - cost.slope(r - width)[0]) / (2 * width)


def _jacobian(solved: LossSolution) -> Array:
    """d ln L / d phi (R, P)."""
    problem = solved.problem
    _, share = problem.shares(solved.parameters)
    full = np.zeros((problem.ln_loss.shape[1], len(NAMES)))
    for part, term in zip(share, problem.terms, strict=True):
        full[:, list(term.columns)] += part[0][:, None] * term.features
    return full @ problem.free


def profile_interval(
    solved: LossSolution, name: str, level: float = 0.95, n: int = 41
) -> list[float]:
    """Interval of a parameter by profile likelihood: the values that the data do not reject.

    The other parameters are refitted at each value. Twice the rise of the cost over
    E psi**2 / E psi' has a chi-squared distribution (Ronchetti 1997), here F with the degrees of
    freedom of the fit. All values are solved in one batch. An end of the interval at an end of the
    grid means that the data do not bound the parameter there.

    Args:
        solved: A fit with all parameters free.
        name: One of "E", "A", "B", "alpha", "beta".
        level: Coverage of the interval.
        n: Number of values.
    """
    from scipy.stats import f

    if name not in NAMES or not solved.shape.free[NAMES.index(name)].any():
        raise UserError(
            f"a profile needs a free parameter, one of {', '.join(NAMES)}, "
            f"but got {name!r}{nearest(name, NAMES)}"
        )
    if len(solved.phi) < len(NAMES):
        raise UserError(
            f"a profile needs all of {', '.join(NAMES)} to be free, "
            f"but only {len(solved.phi)} of them are free and identified by these runs"
        )
    i, dof = NAMES.index(name), max(solved.noise[1], 1)
    sd = float(np.sqrt(covariance(solved)[i, i]))
    steps = np.linspace(-6, 6, n) * sd
    middle = solved.vector[i]
    values = (
        middle * np.exp(steps) if i < len(CHINCHILLA.terms) else np.maximum(middle + steps, 1e-3)
    )
    best = solved.problem.objective(solved.phi[None], solved.estimator.cost)[0]
    rise = _profile(solved, name, values) - best
    slope, curve = _cost_slopes(solved)
    weight = solved.problem.weight[0]
    unit = float((weight**2 * slope**2).sum() / (weight * curve).sum()) * len(slope) / dof
    allowed = 2 * rise / unit <= f.ppf(level, 1, dof)
    return _ends(values, 2 * rise / unit - f.ppf(level, 1, dof), allowed)


def _profile(solved: LossSolution, name: str, values: Array) -> Array:
    """The lowest objective (K,) with the parameter fixed at each value."""
    shapes = [make_shape(CHINCHILLA, solved.centre, {name: float(value)}) for value in values]
    kept = [list(solved.shape.columns).index(column) for column in shapes[0].columns]
    bases, free = np.array([one.base for one in shapes]), shapes[0].free
    problem = replace(
        solved.problem,
        base=bases,
        free=free,
        low=solved.problem.low[kept],
        high=solved.problem.high[kept],
        prior=None,
    )
    exponents = [i for i, column in enumerate(shapes[0].columns) if column >= len(CHINCHILLA.terms)]
    cost = solved.estimator.cost
    places = [
        solved.phi[kept],
        *starts(replace(problem, base=bases[len(values) // 2]), cost, exponents, n=2),
    ]
    objectives = [
        descend(problem, np.repeat(place[None], len(values), axis=0), cost, SPREAD)[1]
        for place in places
    ]
    return np.min(objectives, axis=0)


def _ends(values: Array, over: Array, allowed: NDArray[np.bool_]) -> list[float]:
    """The values where the profile crosses the limit, by linear interpolation."""
    inside = np.flatnonzero(allowed)
    if not len(inside):
        return [float(values[len(values) // 2])] * 2
    ends = []
    for edge, way in ((inside[0], -1), (inside[-1], 1)):
        beyond = edge + way
        if not 0 <= beyond < len(values):
            ends.append(float(values[edge]))
        else:
            share = -over[edge] / (over[beyond] - over[edge])
            ends.append(float(values[edge] + share * (values[beyond] - values[edge])))
    return ends
