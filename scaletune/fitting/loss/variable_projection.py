"""Losses that are sums of power laws, L = sum_i c_i * exp(-theta . x_i): linear in c once the exponents are known.

Solved side by side for many data sets. For exponents on a grid the coefficients are a non-negative linear problem (variable
projection, Golub & Pereyra 1973), which gives the basins to start from; from there damped Newton steps in (ln c, theta) on a
robust cost of the residuals of ln L, with analytic first and second derivatives (ln L is a log-sum-exp of functions linear in the
parameters). A step is taken only when it lowers the cost; a fit stops when a step promises less than RELATIVE of it, whatever its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.stats.robust import Loss

RELATIVE = 1e-11
COARSE = 20  # steps on a cost wider than the one asked for
CHUNK = 2**15  # rows of all fits that are solved together: their arrays then stay in a core's cache

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """One term: ln term = parameters[columns] @ features.T; `features` (R, len(columns)), the first of them 1 (of ln c)."""

    columns: tuple[int, ...]
    features: Array


@dataclass(frozen=True)
class Problem:
    """K fits of the same terms to R rows: ln loss and row weights (K or 1, R); parameters = base + free @ phi, inside a box of phi."""

    terms: Sequence[Term]
    ln_loss: Array
    weight: Array
    base: Array  # (n_parameters) or (K, n_parameters)
    free: Array  # (n_parameters, P)
    low: Array  # (P)
    high: Array
    power: float = 1.0  # of the whole sum: L = (sum of terms)**power
    prior: tuple[Array, Array] | None = (
        None  # mean (P) or (K, P) and precision (P, P) of phi, in units of the cost
    )

    def rows(self, which: NDArray[np.intp] | slice) -> Problem:
        """Some of the fits."""

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
        return (self.weight * loss.cost(self.ln_loss - self.ln_model(phi))).sum(-1) + self._prior(
            phi
        )[0]

    def _prior(self, phi: Array) -> tuple[Array, Array, Array]:
        """What the prior adds to the objective, its gradient and second derivative."""
        if self.prior is None:
            return np.zeros(len(phi)), np.zeros_like(phi), np.zeros((phi.shape[1], phi.shape[1]))
        mean, precision = self.prior
        pull = (phi - mean) @ precision
        return ((phi - mean) * pull).sum(-1) / 2, pull, precision

    def derivatives(self, phi: Array, loss: Loss) -> tuple[Array, Array, Array]:
        """Objective (K,), its gradient (K, P) and second derivative (K, P, P).

        With s the shares and v_i the gradient of ln term i: d ln sum = sum s_i v_i, d2 ln sum = sum s_i v_i v_i' - (d ln sum)(d ln sum)'.
        """
        ln_model, share = self.shares(self.parameters(phi))
        r = self.ln_loss - ln_model
        first, second = loss.slope(r)
        value = (self.weight * loss.cost(r)).sum(-1)
        pull, curve = (
            self.power * self.weight * first,
            self.power * self.weight * (first + self.power * second),
        )
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
    """Add sum_r weight * v_one v_other' (and its transpose) to the blocks of two terms."""
    for p, i in enumerate(one.columns):
        block = weight @ (one.features[:, p : p + 1] * other.features)
        hessian[:, i, list(other.columns)] += block
        if both:
            hessian[:, list(other.columns), i] += block


def descend(
    problem: Problem, start: Array, loss: Loss, spread: float, rounds: int = 200
) -> tuple[Array, Array]:
    """phi (K, P) and objective (K,) at the minimum that each start (K, P) leads to, over ever narrower costs."""
    ends, values, size = [], [], max(CHUNK // problem.ln_loss.shape[1], 1)
    for k in range(0, len(start), size):
        part, here = (
            problem.rows(slice(k, k + size)),
            np.clip(start[k : k + size], problem.low, problem.high),
        )
        for stage in loss.stages(spread):
            here, value = _newton(
                part, here, stage, *((rounds, RELATIVE) if stage == loss else (COARSE, 1e-4))
            )
        ends.append(here)
        values.append(value)
    return np.concatenate(ends), np.concatenate(values)


def _newton(
    problem: Problem, here: Array, loss: Loss, rounds: int, relative: float
) -> tuple[Array, Array]:
    """Damped Newton steps of all fits that are not settled yet."""
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
        settled = (promised <= relative * value[active]) | (damping[active] > 1e14)
        value[moved] = new[better]
        damping[active] = np.where(
            better, np.maximum(damping[active] / 10, 1e-14), damping[active] * 6
        )
        active = active[~settled]
        if not len(active):
            break
    return here, value


def _step(
    here: Array, gradient: Array, hessian: Array, damping: Array, problem: Problem
) -> tuple[Array, Array]:
    """The damped step, kept inside the box, and the decrease its quadratic model promises; a coordinate pushed against its bound stays."""
    stuck = ((here <= problem.low) & (gradient > 0)) | ((here >= problem.high) & (gradient < 0))
    live = ~stuck
    scale = np.abs(np.einsum("kpp->kp", hessian)) * live + 1e-300
    matrix = hessian * (live[:, :, None] & live[:, None, :])
    matrix[:, range(here.shape[1]), range(here.shape[1])] += scale * damping[:, None] + stuck
    step = np.linalg.solve(matrix, -(gradient * live)[..., None])[..., 0].astype(
        np.float64, copy=False
    )
    uphill = (step * gradient).sum(
        -1
    ) > 0  # the quadratic has no minimum there: go down the slope, scaled
    step = np.where(uphill[:, None], -gradient * live / scale / (1 + damping[:, None]), step)
    step = np.clip(here + step, problem.low, problem.high) - here
    return step, -(gradient * step).sum(-1) / 2


def starts(problem: Problem, loss: Loss, exponents: Sequence[int], n: int = 4) -> Array:
    """phi (n, P) to start from: the best places, apart from each other, of the profile over a grid of exponents.

    `exponents` are the coordinates of phi that are exponents; the others are ln of coefficients, solved for.
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
    """ln of the non-negative coefficients that fit L with the least relative squares, for every row of exponents in phi (with ln c = 0)."""
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
    rows = [
        int(np.flatnonzero(problem.free[:, i])[0]) for i in coefficients
    ]  # the term each coefficient belongs to
    rest = 1 - parts[..., [i for i in range(parts.shape[-1]) if i not in rows]].sum(-1)
    design = parts[..., rows] * np.sqrt(problem.weight[0])[:, None]
    gram = np.einsum("kri,krj->kij", design, design)
    return np.log(
        np.maximum(
            _nonnegative(gram, np.einsum("kri,kr->ki", design, rest * np.sqrt(problem.weight[0]))),
            1e-300,
        )
    )


def _nonnegative(gram: Array, right: Array) -> Array:
    """argmin x'Gx/2 - x'b over x >= 0, batched: the best of the feasible minima over all sets of positive coordinates (few: all are tried)."""
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
