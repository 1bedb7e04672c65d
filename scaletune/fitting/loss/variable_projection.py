"""Fits losses that are sums of power laws, L = sum_i c_i * exp(-theta . x_i), to many data sets.

For known exponents theta, L is linear in the coefficients c. For exponents on a grid, c is solved
by non-negative least squares (variable projection, Golub & Pereyra 1973); the best grid points are
the starting points. From there, damped Newton steps in (ln c, theta) minimize a robust cost of the
residuals of ln L, with analytic first and second derivatives: ln L is a log-sum-exp of functions
that are linear in the parameters. A step is taken only if it lowers the cost. A fit stops when a
step promises a decrease of less than TOLERANCE times the cost. All data sets are solved at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.stats.robust import Loss

TOLERANCE = 1e-11
COARSE_STEPS = 20  # Newton steps on a cost that is wider than the requested one
CHUNK_ROWS = 2**15  # rows of all fits that are solved at once: the arrays fit into the cache

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Term:
    """One term: ln term = parameters[columns] @ features.T."""

    columns: tuple[int, ...]

    features: Array
    """(R, len(columns)); the first column is 1, for ln c."""


@dataclass(frozen=True)
class Problem:
    """K fits of the same terms to R rows.

    L = (sum of terms)**power with parameters = base + free @ phi, where phi is in a box.
    """

    terms: Sequence[Term]

    ln_loss: Array
    """(K or 1, R)"""

    weight: Array
    """(K or 1, R) row weights."""

    base: Array
    """(n_parameters) or (K, n_parameters)"""

    free: Array
    """(n_parameters, P)"""

    low: Array
    """(P) lower bounds of phi."""

    high: Array
    """(P) upper bounds of phi."""

    power: float = 1.0

    prior: tuple[Array, Array] | None = None
    """Mean (P) or (K, P) and precision (P, P) of phi, in units of the cost."""

    def rows(self, which: NDArray[np.intp] | slice) -> Problem:
        """The problem of some of the fits."""

        def of(values: Array, ndim: int) -> Array:
            return values[which] if values.ndim == ndim and len(values) > 1 else values

        prior = self.prior and (of(self.prior[0], 2), self.prior[1])
        return replace(
            self,
            ln_loss=of(self.ln_loss, 2),
            weight=of(self.weight, 2),
            base=of(self.base, 2),
            prior=prior,
        )

    def sample(self, n: int, seed: int = 0) -> Problem:
        """The problem of `n` random rows of data, whose weights stand for all rows."""
        total = self.ln_loss.shape[1]
        kept = np.sort(np.random.default_rng(seed).permutation(total)[:n])
        return replace(
            self,
            terms=[replace(term, features=term.features[kept]) for term in self.terms],
            ln_loss=self.ln_loss[:, kept],
            weight=self.weight[:, kept] * (total / n),
        )

    def parameters(self, phi: Array) -> Array:
        """(K, n_parameters) of phi (K, P)."""
        return self.base + phi @ self.free.T

    def shares(self, parameters: Array) -> tuple[Array, list[Array]]:
        """ln L (K, R) and each term's share of the sum."""
        parts = [np.exp(parameters[:, list(term.columns)] @ term.features.T) for term in self.terms]
        total = sum(parts[1:], parts[0])
        return self.power * np.log(total), [part / total for part in parts]

    def ln_model(self, phi: Array) -> Array:
        """ln L (K, R)."""
        parameters = self.parameters(phi)
        return self.power * np.log(
            sum(np.exp(parameters[:, list(term.columns)] @ term.features.T) for term in self.terms)
        )

    def objective(self, phi: Array, loss: Loss) -> Array:
        """Sum over rows of the weighted cost of the residual of ln L: (K,)."""
        cost = (self.weight * loss.cost(self.ln_loss - self.ln_model(phi))).sum(-1)
        return cost + self._prior(phi)[0]

    def _prior(self, phi: Array) -> tuple[Array, Array, Array]:
        """Contribution of the prior to the objective, its gradient and second derivative."""
        if self.prior is None:
            return np.zeros(len(phi)), np.zeros_like(phi), np.zeros((phi.shape[1], phi.shape[1]))
        mean, precision = self.prior
        pull = (phi - mean) @ precision
        return ((phi - mean) * pull).sum(-1) / 2, pull, precision

    def derivatives(self, phi: Array, loss: Loss) -> tuple[Array, Array, Array]:
        """Objective (K,), its gradient (K, P) and second derivative (K, P, P).

        With the shares s_i and the gradients v_i of ln term i: d ln sum = sum s_i v_i and
        d2 ln sum = sum s_i v_i v_i' - (d ln sum)(d ln sum)'.
        """
        ln_model, share = self.shares(self.parameters(phi))
        r = self.ln_loss - ln_model
        first, second = loss.slope(r)
        value = (self.weight * loss.cost(r)).sum(-1)
        pull = self.power * self.weight * first
        curve = self.power * self.weight * (first + self.power * second)
        n = self.free.shape[0]
        gradient, hessian = np.zeros((len(phi), n)), np.zeros((len(phi), n, n))
        for i, one in enumerate(self.terms):
            here = pull * share[i]
            gradient[:, list(one.columns)] -= here @ one.features
            _add(hessian, one, one, curve * share[i] ** 2 - here)
            bent = curve * share[i]
            for j in range(i):
                _add(hessian, one, self.terms[j], bent * share[j], both=True)
        cost, pull, precision = self._prior(phi)
        return (
            value + cost,
            gradient @ self.free + pull,
            self.free.T @ hessian @ self.free + precision,
        )


def _add(hessian: Array, one: Term, other: Term, weight: Array, both: bool = False) -> None:
    """Adds sum_r weight * v_one v_other', and with `both` its transpose, to the blocks."""
    blocks = weight @ _products(one, other)
    for p, i in enumerate(one.columns):
        block = blocks[:, p * len(other.columns) : (p + 1) * len(other.columns)]
        hessian[:, i, list(other.columns)] += block
        if both:
            hessian[:, list(other.columns), i] += block


@lru_cache(maxsize=16)
def _products(one: Term, other: Term) -> Array:
    """(R, features of one * features of other): the products of the features of each row."""
    return (one.features[:, :, None] * other.features[:, None]).reshape(len(one.features), -1)


def descend(
    problem: Problem, start: Array, loss: Loss, spread: float, rounds: int = 200
) -> tuple[Array, Array]:
    """phi (K, P) and objective (K,) at the minimum reached from each start (K, P).

    The cost is made narrower in stages.
    """
    ends, values, size = [], [], max(CHUNK_ROWS // problem.ln_loss.shape[1], 1)
    for k in range(0, len(start), size):
        part = problem.rows(slice(k, k + size))
        here = np.clip(start[k : k + size], problem.low, problem.high)
        for stage in loss.stages(spread):
            limits = (rounds, TOLERANCE) if stage == loss else (COARSE_STEPS, 1e-4)
            here, value = _newton(part, here, stage, *limits)
        ends.append(here)
        values.append(value)
    return np.concatenate(ends), np.concatenate(values)


def _newton(
    problem: Problem, here: Array, loss: Loss, rounds: int, relative: float
) -> tuple[Array, Array]:
    """Damped Newton steps of all fits until they converge."""
    here = here.copy()
    value, gradient, hessian = problem.derivatives(here, loss)
    damping, active = np.full(len(here), 1e-3), np.arange(len(here))
    for _ in range(rounds):
        step, promised = _step(
            here[active], gradient[active], hessian[active], damping[active], problem
        )
        there = here[active] + step
        part = problem.rows(active)
        new, slope, curve = part.derivatives(there, loss)
        better = new < value[active]
        moved = active[better]
        here[moved], gradient[moved], hessian[moved] = there[better], slope[better], curve[better]
        converged = (promised <= relative * value[active]) | (damping[active] > 1e14)
        value[moved] = new[better]
        damping[active] = np.where(
            better, np.maximum(damping[active] / 10, 1e-14), damping[active] * 6
        )
        active = active[~converged]
        if not len(active):
            break
    return here, value


def _step(
    here: Array, gradient: Array, hessian: Array, damping: Array, problem: Problem
) -> tuple[Array, Array]:
    """The damped step inside the box, and the decrease that its quadratic model promises.

    A coordinate at a bound that the gradient pushes outwards does not move.
    """
    stuck = ((here <= problem.low) & (gradient > 0)) | ((here >= problem.high) & (gradient < 0))
    live = ~stuck
    scale = np.abs(np.einsum("kpp->kp", hessian)) * live + 1e-300
    matrix = hessian * (live[:, :, None] & live[:, None, :])
    matrix[:, range(here.shape[1]), range(here.shape[1])] += scale * damping[:, None] + stuck
    step = np.linalg.solve(matrix, -(gradient * live)[..., None])[..., 0].astype(
        np.float64, copy=False
    )
    # Where the quadratic has no minimum, the step follows the scaled negative gradient.
    uphill = (step * gradient).sum(-1) > 0
    step = np.where(uphill[:, None], -gradient * live / scale / (1 + damping[:, None]), step)
    step = np.clip(here + step, problem.low, problem.high) - here
    return step, -(gradient * step).sum(-1) / 2


def starts(problem: Problem, loss: Loss, exponents: Sequence[int], n: int = 4) -> Array:
    """Starting points phi (n, P): the best, well separated points of a grid of exponents.

    `exponents` are the coordinates of phi that are exponents. The others are ln coefficients, which
    are solved for.
    """
    side = {0: 1, 1: 24, 2: 12, 3: 6}.get(len(exponents), 4)
    index = np.indices([side] * len(exponents)).reshape(len(exponents), side ** len(exponents)).T
    phi = np.zeros((len(index), problem.free.shape[1]))
    phi[:, exponents] = np.geomspace(0.05, 1.2, side)[index] if len(exponents) else 0.0
    coefficients = [i for i in range(phi.shape[1]) if i not in exponents]
    phi[:, coefficients] = _coefficients(problem, phi, coefficients)
    phi = np.clip(phi, problem.low, problem.high)
    order = np.argsort(problem.objective(phi, loss), kind="stable")
    kept: list[int] = []
    for k in order:
        if all(np.abs(index[k] - index[j]).max(initial=0) > 1 for j in kept) and len(kept) < n:
            kept.append(int(k))
    return phi[kept]


def _coefficients(problem: Problem, phi: Array, coefficients: Sequence[int]) -> Array:
    """ln of the non-negative coefficients that minimize the squared relative residuals of L.

    One solution for every row of exponents in phi, whose coefficients are given as ln c = 0.
    """
    parameters = problem.parameters(phi)
    parts = np.stack(
        [
            np.exp(
                parameters[:, list(t.columns)] @ t.features.T - problem.ln_loss[:1] / problem.power
            )
            for t in problem.terms
        ],
        -1,
    )
    # The term of each coefficient.
    rows = [int(np.flatnonzero(problem.free[:, i])[0]) for i in coefficients]
    rest = 1 - parts[..., [i for i in range(parts.shape[-1]) if i not in rows]].sum(-1)
    root_weight = np.sqrt(problem.weight[0])
    design = parts[..., rows] * root_weight[:, None]
    gram = np.einsum("kri,krj->kij", design, design)
    right = np.einsum("kri,kr->ki", design, rest * root_weight)
    return np.log(np.maximum(_nonnegative(gram, right), 1e-300))


def _nonnegative(gram: Array, right: Array) -> Array:
    """argmin x'Gx/2 - x'b over x >= 0, batched.

    Tries all sets of positive coordinates, of which there are few, and keeps the best feasible one.
    """
    m = right.shape[1]
    best, lowest = np.zeros_like(right), np.zeros(len(right))
    scale = np.sqrt(np.einsum("kii->ki", gram)) + 1e-300
    gram, right = gram / (scale[:, :, None] * scale[:, None, :]), right / scale
    for size in range(1, m + 1):
        for kept in map(list, combinations(range(m), size)):
            part = gram[:, kept][:, :, kept] + 1e-13 * np.eye(size)
            x = np.linalg.solve(part, right[:, kept, None])[..., 0]
            value = -(x * right[:, kept]).sum(-1) / 2
            better = (x > 0).all(-1) & (value < lowest)
            lowest = np.where(better, value, lowest)
            filled = np.zeros_like(right)
            filled[:, kept] = x
            best = np.where(better[:, None], filled, best)
    return best / scale
