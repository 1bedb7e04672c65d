"""Proposes the next point of a cell by expected improvement over randomly drawn loss basins.

With x = ln lr and y = ln batch_tokens, a basin is the relative excess over the minimum loss

    gap = a phi(x - x0 + k (y - y0), s) + b phi(y - y0, r)
    phi(t, s) = (exp(s t) - 1 - s t) / s**2

phi is a parabola for s = 0 and steeper above the optimum for s > 0. Thousands of basins are drawn
from a prior made from public sweeps, and weighted by their likelihood given the observed losses
(the minimum loss is integrated out). The proposal is the point with the largest expected
improvement (Mockus 1978). Nothing is fitted, so two or three losses are enough. With one column of
points it is a search in lr only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError

Array = NDArray[np.float64]
# Larger gaps are clipped to this one: such a run only shows that the optimum is elsewhere.
TALL = 0.3


@dataclass(frozen=True)
class BasinPrior:
    """(mean, sd) of a basin's parameters.

    Broad around the values of the 8 public (lr, batch size) grids of arXiv:2503.04715 with 0.2e9 to
    0.4e9 parameters.
    """

    centre: float = 0.5
    """Sd of the optimum about the middle of the range, in half widths of the range."""
    reach: float = 1.2
    """Largest distance of the optimum from the middle, in half widths."""
    curvature: tuple[float, float] = (math.log(0.018), 0.35)
    """Of ln a; a is the second derivative of the gap in ln lr."""
    tail: tuple[float, float] = (0.1, 4.0)
    """A share of the draws whose curvatures have so many times the sd: small proxies, short runs
    and models of other kinds may have basins unlike those of the public grids."""
    batch_curvature: tuple[float, float] = (math.log(0.0125), 0.3)
    """Of ln b."""
    tilt: tuple[float, float] = (-0.3, 0.2)
    """Of k: the best lr rises as batch**-k."""
    skew: tuple[float, float] = (0.65, 0.35)
    """Of s."""
    batch_skew: tuple[float, float] = (0.2, 0.35)
    """Of r."""
    noise: float = 0.0012
    """Sd of ln loss of one run."""
    misfit: float = 0.2
    """Sd of the form's own error, as a share of the gap."""
    cliff: float = 0.1
    """A diverged run counts as a gap of `TALL` with this sd: its true gap is unknown."""


@dataclass(frozen=True)
class Proposal:
    """The point to train next."""

    index: int
    """Index of the candidate."""
    gain: float
    """Expected improvement of the lowest loss, relative; infinite before any loss is known."""
    outside: float
    """Probability that the optimum is outside the range, which should then be extended."""
    expected: float
    """Expected loss. Stands for the loss while the point trains; relative to the minimum loss
    before any loss is known."""


def draw_basins(points: Array, draws: int, seed: int, prior: BasinPrior) -> tuple[Array, Array]:
    """Draws basins from the prior.

    Returns:
        Gaps [draws, G] at the points [G, 1 or 2] of ln lr (and ln batch_tokens), and the optima
        [draws, 1 or 2] in half widths of the range from its middle.
    """
    rng = np.random.default_rng(seed)
    low, high = points.min(0), points.max(0)
    place = np.clip(
        rng.normal(0, prior.centre, (draws, points.shape[1])), -prior.reach, prior.reach
    )
    optimum = (low + high) / 2 + place * (high - low) / 2
    offset = points[None] - optimum[:, None]  # [draws, G, 1 or 2]
    normal = rng.normal(size=(5, draws, 1))
    share, width = prior.tail
    normal[[0, 3], : round(share * draws)] *= width

    def draw(i: int, moments: tuple[float, float]) -> Array:
        return moments[0] + moments[1] * normal[i]

    if points.shape[1] == 1:
        return np.exp(draw(0, prior.curvature)) * phi(offset[..., 0], draw(1, prior.skew)), place
    tilted = offset[..., 0] + draw(2, prior.tilt) * offset[..., 1]
    gap = np.exp(draw(0, prior.curvature)) * phi(tilted, draw(1, prior.skew))
    batch_gap = phi(offset[..., 1], draw(4, prior.batch_skew))
    return gap + np.exp(draw(3, prior.batch_curvature)) * batch_gap, place


def phi(t: Array, s: Array | float) -> Array:
    """(exp(s t) - 1 - s t) / s**2, with s kept away from 0 and the exponent within [-40, 12]."""
    s = np.where(np.abs(s) < 1e-3, 1e-3, s)
    u = np.clip(s * t, -40.0, 12.0)
    return (np.expm1(u) - u) / s**2


def _posterior(
    gaps: Array, seen: Sequence[int], ln_loss: Array, prior: BasinPrior
) -> tuple[Array, Array]:
    """(weights [draws], ln minimum loss [draws]) of the draws given ln losses (NaN: diverged).

    The likelihood is Gaussian about ln minimum loss + gap; the prior of the minimum loss is flat.
    """
    gap, finite = np.minimum(gaps[:, list(seen)], TALL), np.isfinite(ln_loss)
    score = -0.5 * (((TALL - gap[:, ~finite]) / prior.cliff) ** 2).sum(1)
    minimum = np.zeros(len(gaps))
    if finite.any():
        gap = gap[:, finite]
        ln_loss = np.minimum(ln_loss[finite], ln_loss[finite].min() + TALL)
        precision = 1 / (prior.noise + prior.misfit * gap) ** 2
        minimum = (precision * (ln_loss - gap)).sum(1) / precision.sum(1)
        residuals = ln_loss - gap - minimum[:, None]
        score += 0.5 * (
            np.log(precision).sum(1) - np.log(precision.sum(1)) - (precision * residuals**2).sum(1)
        )
    weights = np.exp(score - score.max())
    return weights / weights.sum(), minimum


def propose(
    points: Array,
    seen: Sequence[int],
    losses: Sequence[float],
    *,
    draws: int = 10_000,
    seed: int = 0,
    prior: BasinPrior = BasinPrior(),
) -> Proposal:
    """Proposes the candidate to train next; never one that is trained.

    Args:
        points: Candidates [G, 1 or 2]: ln lr, and ln batch_tokens if it is searched too.
        seen: Indices of the trained candidates.
        losses: Their losses; a loss that is not finite has diverged.
        draws: The number of basins.
        seed: Seed of the draws.
        prior: The distribution of the basins.

    Raises:
        UserError: All candidates are trained.
    """
    if len(set(seen)) >= len(points):
        raise UserError(
            f"at least one candidate must be untrained, but all {len(points)} are trained"
        )
    gaps, place = draw_basins(np.asarray(points, float), draws, seed, prior)
    known = np.asarray(losses, float)
    ln_loss = np.log(np.where(np.isfinite(known), known, np.nan))
    weights, minimum = _posterior(gaps, seen, ln_loss, prior)
    gap = weights @ np.minimum(gaps, TALL)
    outside = float(weights @ (np.abs(place) > 1).any(1))
    if not np.isfinite(ln_loss).any():
        gap[list(seen)] = np.inf
        return Proposal(int(gap.argmin()), math.inf, outside, math.exp(gap.min()))
    gain = weights @ np.maximum(0.0, np.nanmin(ln_loss) - minimum[:, None] - gaps)
    gain[list(seen)] = -1.0
    index = int(gain.argmax())
    expected = math.exp(float(weights @ minimum + gap[index]))
    return Proposal(index, float(gain[index]), outside, expected)
