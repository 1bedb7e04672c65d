"""Where to look next in a cell: the point that most lowers the best loss to come, over basins drawn from what public sweeps look like.

A basin in x = ln lr and y = ln batch_tokens is gap = a phi(x - x0 + k (y - y0), s) + b phi(y - y0, r), as a share of the floor, with
phi(t, s) = (exp(s t) - 1 - s t) / s**2: a parabola where s = 0, steeper above the optimum where s > 0. Thousands of them are drawn
from a prior, weighted by how well they pass through the losses seen (the floor integrated out), and vote: expected improvement
(Mockus 1978). Nothing is fitted, so two or three losses are enough to move by. With one column it is a search in lr alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.errors import UserError

Array = NDArray[np.float64]
TALL = 0.3  # gaps above this are one: such a run says that the optimum is not here, and no more


@dataclass(frozen=True)
class Prior:
    """(mean, sd) of a basin's numbers; broad around those of the 8 public (lr, batch) grids of arXiv:2503.04715 at 0.2e9 to 0.4e9 parameters."""

    centre: float = 0.5  # sd of the optimum's place about the middle, in half widths of the range
    reach: float = 1.2  # how far out it may be, in half widths
    curvature: tuple[float, float] = (
        math.log(0.018),
        0.35,
    )  # of ln a: second derivative of the gap in ln lr
    batch_curvature: tuple[float, float] = (math.log(0.0125), 0.3)  # of ln b
    tilt: tuple[float, float] = (-0.3, 0.2)  # k: the best lr rises as batch**-k
    skew: tuple[float, float] = (0.65, 0.35)  # s
    batch_skew: tuple[float, float] = (0.2, 0.35)  # r
    noise: float = 0.0012  # sd of a run's ln loss
    misfit: float = 0.2  # sd of the form's error, as a share of the gap
    cliff: float = 0.1  # a run that diverged says as much as a gap of TALL, this unsure: training falls off a cliff, not up a parabola


@dataclass(frozen=True)
class Proposal:
    """The point to train next, and what it is worth."""

    index: int  # of the candidates
    gain: (
        float  # expected fall of the best loss, as a share of it; infinite before anything is seen
    )
    outside: float  # probability that the optimum is beyond the range: extend it
    expected: float  # loss there, as far as is known: what a point still in training counts as (its floor is 1 before anything is seen)


def basins(points: Array, draws: int, seed: int, prior: Prior) -> tuple[Array, Array]:
    """Gaps [draws, G] at points [G, 1 or 2] of ln lr (and ln batch_tokens), and each draw's place of the optimum in half widths."""
    rng = np.random.default_rng(seed)
    low, high = points.min(0), points.max(0)
    place = np.clip(
        rng.normal(0, prior.centre, (draws, points.shape[1])), -prior.reach, prior.reach
    )
    away = (
        points[None] - ((low + high) / 2 + place * (high - low) / 2)[:, None]
    )  # [draws, G, 1 or 2]
    normal = rng.normal(size=(5, draws, 1))

    def drawn(i: int, of: tuple[float, float]) -> Array:
        return of[0] + of[1] * normal[i]

    if points.shape[1] == 1:
        return np.exp(drawn(0, prior.curvature)) * phi(away[..., 0], drawn(1, prior.skew)), place
    across = away[..., 0] + drawn(2, prior.tilt) * away[..., 1]
    gap = np.exp(drawn(0, prior.curvature)) * phi(across, drawn(1, prior.skew))
    return gap + np.exp(drawn(3, prior.batch_curvature)) * phi(
        away[..., 1], drawn(4, prior.batch_skew)
    ), place


def phi(t: Array, s: Array | float) -> Array:
    """(exp(s t) - 1 - s t) / s**2; s is held off 0, and the exponent under what a float can bear."""
    s = np.where(np.abs(s) < 1e-3, 1e-3, s)
    u = np.clip(s * t, -40.0, 12.0)
    return (np.expm1(u) - u) / s**2


def _weigh(gaps: Array, seen: Sequence[int], ln_loss: Array, prior: Prior) -> tuple[Array, Array]:
    """(weights [draws], ln floor [draws]) of the draws given ln losses (NaN: diverged): Gaussian about floor + gap, a flat prior on the floor."""
    heights, known = np.minimum(gaps[:, list(seen)], TALL), np.isfinite(ln_loss)
    score = -0.5 * (((TALL - heights[:, ~known]) / prior.cliff) ** 2).sum(1)
    floor = np.zeros(len(gaps))
    if known.any():
        heights, ln_loss = (
            heights[:, known],
            np.minimum(ln_loss[known], ln_loss[known].min() + TALL),
        )
        precision = 1 / (prior.noise + prior.misfit * heights) ** 2
        floor = (precision * (ln_loss - heights)).sum(1) / precision.sum(1)
        left = ln_loss - heights - floor[:, None]
        score += 0.5 * (
            np.log(precision).sum(1) - np.log(precision.sum(1)) - (precision * left**2).sum(1)
        )
    weights = np.exp(score - score.max())
    return weights / weights.sum(), floor


def propose(
    points: Array,
    seen: Sequence[int],
    losses: Sequence[float],
    *,
    draws: int = 10_000,
    seed: int = 0,
    prior: Prior = Prior(),
) -> Proposal:
    """The candidate [G, 1 or 2] to train next, after `losses` at the candidates `seen`; a loss that is not finite has diverged.

    Trained candidates are not proposed again. UserError when none is left.
    """
    if len(set(seen)) >= len(points):
        raise UserError(
            f"a search needs a point that is not trained yet, but all {len(points)} are"
        )
    gaps, place = basins(np.asarray(points, float), draws, seed, prior)
    known = np.asarray(losses, float)
    ln_loss = np.log(np.where(np.isfinite(known), known, np.nan))
    weights, floor = _weigh(gaps, seen, ln_loss, prior)
    height = weights @ np.minimum(gaps, TALL)
    outside = float(weights @ (np.abs(place) > 1).any(1))
    if not np.isfinite(ln_loss).any():
        height[list(seen)] = np.inf
        return Proposal(int(height.argmin()), math.inf, outside, math.exp(height.min()))
    gain = weights @ np.maximum(0.0, np.nanmin(ln_loss) - floor[:, None] - gaps)
    gain[list(seen)] = -1.0
    index = int(gain.argmax())
    return Proposal(
        index, float(gain[index]), outside, math.exp(float(weights @ floor + height[index]))
    )
