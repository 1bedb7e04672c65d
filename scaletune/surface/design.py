"""Bayesian experimental design for the joint surface: the value of a run before it is trained.

With the law near theta, ln loss is linear in theta and in the deviation of its cell, and the
normal prior becomes a normal posterior whose covariance does not depend on the losses. The
criterion is the posterior mean of what matters at the target,

    trace(H cov(ln lr*, ln batch*)) / 2 + LOSS_WEIGHT * var(ln F),

where H is the curvature of ln loss at the optimum, so the first term is the expected excess loss
of the predicted lr and batch size. This is a V-optimal (prediction-variance) design, a case of
Bayesian L-optimality (Chaloner & Verdinelli 1995, Statistical Science 10, 273). As H and the
Jacobian depend on theta, the criterion is averaged over draws of theta (pseudo-Bayesian, their
section 4): a run that is informative under one theta is far outside the loss basin under another.

`GreedyDesign` takes runs one by one. Conditioning on a run is a rank-one update of the covariance
of the candidates' losses, kept as a pivoted incomplete Cholesky factor, which makes a step linear
in the number of candidates. The same update serves a run that is trained, a run that is being
trained, and a run that is only considered. `planning/` starts from the prior;
`sweeping/search/joint_design.py` starts from the MAP estimate of the runs so far.
"""

from __future__ import annotations

import copy
import math

import numpy as np
from numpy.typing import NDArray

from scaletune.surface.basin import REACH, directions
from scaletune.surface.model import LAW, STUDENT, Scales, SurfaceRuns, law_basis, ln_loss

LOSS_WEIGHT = 5.0
"""An error of the predicted loss of 1 % counts as much as an excess loss of 0.05 %."""

Array = NDArray[np.float64]


def expected_weight(excess: Array, scales: Scales) -> Array:
    """(R,) Fisher information of runs about their own ln loss.

    (nu + 1) / (nu + 3) / scale**2 for Student's t (Lange, Little & Taylor 1989).
    """
    return (STUDENT + 1) / (STUDENT + 3) / scales.variance(excess)


def within_reach(runs: SurfaceRuns, excess: Array) -> NDArray[np.bool_]:
    """(R,) whether a fit would keep the run: its loss is near the lowest of its cell's runs."""
    lowest = np.minimum.reduceat(excess, runs.starts)[runs.cell]
    return 1 + excess <= (1 + REACH) * (1 + lowest)


def expected_information(runs: SurfaceRuns, theta: Array, scales: Scales, copies: Array) -> Array:
    """(C, P, P) expected information of each cell's runs about theta; losses are not read.

    The deviations of the cells are integrated out. With the information of the prior, the sum is
    the inverse of the covariance that a fit of these runs would have if the law were theta.

    Args:
        runs: The runs.
        theta: (P,) parameters.
        scales: Noise and scatter.
        copies: (R,) number of seeds of each run.
    """
    _, to_theta, to_delta, excess = ln_loss(
        theta, np.zeros((runs.n_cells, len(scales.scatter))), runs
    )
    weight = (copies * expected_weight(excess, scales))[:, None]
    of_theta = runs.per_cell(np.einsum("rp,rq->rpq", to_theta, to_theta * weight))
    of_delta = runs.per_cell(np.einsum("ri,rj->rij", to_delta * weight, to_delta)) + np.diag(
        scales.scatter**-2.0
    )
    cross = runs.per_cell(np.einsum("rp,ri->rpi", to_theta, to_delta * weight))
    return of_theta - cross @ np.linalg.inv(of_delta) @ cross.transpose(0, 2, 1)


def target_gradient(theta: Array, target: tuple[float, float], n_axes: int) -> Array:
    """(axes + 1, P) derivatives of the ln optimum and ln minimum loss at the target (n, d)."""
    n, d = np.array([target[0]]), np.array([target[1]])
    basis, k = law_basis(n, d)[0], n_axes
    out = np.zeros((k + 1, len(theta)))
    for i in range(k):
        out[i, LAW * i : LAW * i + LAW] = basis
    optimum = (theta[: LAW * k].reshape(k, LAW) @ basis)[None]
    at = SurfaceRuns(n, d, optimum, np.zeros(1), np.zeros(1, int))
    out[k] = ln_loss(theta, np.zeros((1, k + 1)), at)[1][0]  # the excess has no slope here
    return out


def criterion_weights(theta: Array, target: tuple[float, float], n_axes: int) -> Array:
    """(axes + 1, axes + 1) W: the criterion is trace(W cov) of the rows of `target_gradient`."""
    k, ways = n_axes, np.array(list(directions(n_axes).values()), float)
    first = LAW * k + 5
    curvature = np.exp(
        theta[first : first + len(ways)] + theta[-2] * target[0] + theta[-1] * target[1]
    )
    out = np.zeros((k + 1, k + 1))
    out[:k, :k] = (ways.T * curvature) @ ways / 2
    out[k, k] = LOSS_WEIGHT
    return out


class GreedyDesign:
    """The linearized posterior of all candidates' ln losses and of the target, under each draw."""

    def __init__(
        self,
        candidates: SurfaceRuns,
        target: tuple[float, float],
        draws: Array,
        prior: Array,
        scales: Scales,
        *,
        most: int,
        copies: int = 1,
        delta: Array | None = None,
    ) -> None:
        """Starts from the prior.

        Args:
            candidates: R runs that could be trained, and those that are.
            target: (n, d) of the target.
            draws: (S, P) parameters that the surface may have.
            prior: (P, 2) mean and sd of theta in a fit.
            scales: Noise and scatter.
            most: Largest number of runs that will be taken.
            copies: Number of seeds of each run.
            delta: (C, axes + 1) deviations of the cells; None: zero.
        """
        k = candidates.x.shape[1]
        delta = np.zeros((candidates.n_cells, k + 1)) if delta is None else delta
        parts = [ln_loss(theta, delta, candidates) for theta in draws]
        self.to_theta = np.array([p[1] for p in parts])  # (S, R, P)
        self.to_delta = np.array([p[2] for p in parts])  # (S, R, axes + 1)
        excess = np.array([p[3] for p in parts])
        kept = np.array([within_reach(candidates, each) for each in excess])
        self.noise = np.where(kept, 1 / (copies * expected_weight(excess, scales)), math.inf)
        self.prior_variance, self.scatter2 = prior[:, 1] ** 2, scales.scatter**2
        self.cell = candidates.cell
        self.variance = np.einsum("srp,p->sr", self.to_theta**2, self.prior_variance) + np.einsum(
            "srk,k->sr", self.to_delta**2, self.scatter2
        )
        rows = np.array(
            [
                np.linalg.cholesky(criterion_weights(theta, target, k)).T
                @ target_gradient(theta, target, k)
                for theta in draws
            ]
        )  # (S, axes + 1, P): the criterion is the sum of the variances of these
        self.criteria = np.einsum("sqp,p->sq", rows**2, self.prior_variance)
        self.to_target = np.einsum("sqp,p,srp->sqr", rows, self.prior_variance, self.to_theta)
        self.factor, self.n_taken = np.zeros((most, *self.variance.shape)), 0
        self.taken = np.zeros(len(candidates.n), bool)

    @property
    def expected_excess(self) -> float:
        """The first term of the criterion given the runs taken: a share of the loss."""
        return float(self.criteria[:, :-1].sum(1).mean())

    def gains(self) -> Array:
        """(R,) decrease of the criterion by one more run; 0 for runs that are taken."""
        gain = ((self.to_target**2).sum(1) / (self.variance + self.noise)).mean(0)
        return np.where(self.taken, 0.0, gain)

    def take(self, i: int) -> None:
        """Conditions on run i: rank-one updates of all variances and covariances."""
        row = np.einsum("sp,srp->sr", self.to_theta[:, i] * self.prior_variance, self.to_theta)
        row += np.where(
            self.cell == self.cell[i],
            np.einsum("sk,srk->sr", self.to_delta[:, i] * self.scatter2, self.to_delta),
            0.0,
        )
        earlier = self.factor[: self.n_taken]
        row -= np.einsum("ts,tsr->sr", earlier[:, :, i], earlier)
        root = np.sqrt(self.variance[:, i] + self.noise[:, i])
        row, target = row / root[:, None], self.to_target[:, :, i] / root[:, None]
        self.to_target = self.to_target - target[:, :, None] * row[:, None]
        self.criteria = self.criteria - target**2
        self.variance = self.variance - row**2
        self.factor[self.n_taken] = row
        self.n_taken += 1
        self.taken[i] = True

    def branch(self) -> GreedyDesign:
        """A copy to consider runs with; it is valid until this design takes another run."""
        other = copy.copy(self)
        other.taken = self.taken.copy()
        return other
