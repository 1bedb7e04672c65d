"""The prior of the joint surface's parameters, and random surfaces from a normal distribution.

`PRIORS` holds the mean and sd of every exponent and shape parameter before any run is seen.
`along` is the exponent when tokens grow with n_params, on which published laws agree better than
on `D`, the exponent of tokens at fixed n_params (in which sequences and parametrizations differ).

| parameter | published values |
|---|---|
| lr along | -0.41 Step Law, -0.36 Porian, -0.25 DeepSeek, -0.31 Ling |
| lr along | -0.11 Moonlight, -0.55 Bjorck |
| lr D | +0.31 Step Law, -0.32 Bjorck (at fixed batch) |
| batch along | 0.57 Step Law, 0.70 Porian, 0.65 DeepSeek, 0.73 Ling |
| batch along | 0.83 Moonlight, 0.38 Power Lines, 0.5 Time Transfer |
| batch along | critical batch 0.47 Zhang, 0.46 Power Lines, 0.5 Merrill; mean of all 0.58 |
| batch D | 0.57, 0.38, 0.5; critical batch 0.46 to 0.5 |
| alpha, beta | 0.18 to 0.51, most near 0.35 |

alpha and beta are from arXiv:2203.15556, 2404.10102, 2305.16264 and 2502.06857. The shape
parameters (curvature, skew, reach) are those of public sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scaletune.surface.evaluation import AXES
from scaletune.surface.model import LAW, Scales, SurfaceRuns, law_basis, parameter_names

PRIORS: dict[str, tuple[float, float]] = {
    "lr.along": (-0.33, 0.2), "lr.D": (0.1, 0.3),
    "batch.along": (0.58, 0.2), "batch.D": (0.5, 0.2),
    "wd.along": (0.0, 0.3), "wd.D": (0.0, 0.3),
    "loss.alpha": (0.35, 0.1), "loss.beta": (0.35, 0.1),
    "curvature.lr": (-4.5, 1.0), "curvature.batch": (-4.8, 1.0), "curvature.ratio": (-4.8, 1.0),
    "curvature.wd": (-5.5, 1.0), "curvature.product": (-5.5, 1.0),
    "skew.lr": (0.4, 0.4), "skew.batch": (0.7, 0.5), "skew.ratio": (0.7, 0.5),
    "skew.wd": (0.0, 0.5), "skew.product": (0.0, 0.5),
    "reach.lr": (0.0, 0.5),
    "width.n": (0.0, 0.15), "width.d": (0.0, 0.15),
}  # fmt: skip
"""(mean, sd) of the parameters that do not depend on the runs."""
CENTRE_SD = 1.5
"""Sd of ln optimum at the centre, about the cells' best runs."""
E_SHARE = (0.7, 0.25)
"""Irreducible part of the lowest losses, and its sd in logs."""
TERM_SD = 1.0
"""Sd of ln A and ln B."""
SCATTER = {"lr": 0.18, "batch": 0.22, "wd": 0.3, "loss": 0.0025}
"""Prior guess of the sd of cells about the law, in logs."""
SCATTER_WEIGHT = 2.0
"""Number of cells that this guess counts for."""
NOISE = 1e-3
"""Prior guess of `Scales.noise`."""
MISFIT = 0.15
"""Prior guess of `Scales.misfit`."""
DRAWS, TEST_DRAWS = 12, 24

Array = NDArray[np.float64]


def prior_about(optimum: Sequence[float] | Array, lowest_loss: float) -> Array:
    """(P, 2) mean and sd of theta.

    Args:
        optimum: (axes,) guess of the ln optimum at the centre.
        lowest_loss: Guess of the minimum loss at the centre, nats/token.
    """
    known = {f"{axis}.c": (float(x), CENTRE_SD) for axis, x in zip(AXES, optimum, strict=False)}
    known |= {"loss.E": (math.log(E_SHARE[0] * lowest_loss), E_SHARE[1])}
    term = math.log((1 - E_SHARE[0]) / 2 * lowest_loss)
    known |= {f"loss.{name}": (term, TERM_SD) for name in "AB"}
    return np.array([(PRIORS | known)[name] for name in parameter_names(len(optimum))])


def fit_prior(runs: SurfaceRuns) -> Array:
    """(P, 2) the prior of a fit of these runs: about the best run of each cell and its loss."""
    parts = np.split(runs.y, runs.starts[1:])
    best = [
        start + int(np.nanargmin(part))
        for start, part in zip(runs.starts, parts, strict=True)
        if not np.isnan(part).all()
    ]
    return prior_about(runs.x[best].mean(0), float(np.exp(runs.y[best].mean())))


def guessed_scales(n_axes: int, noise: float | None = None) -> Scales:
    """The prior guess of the scales; `noise` replaces that of one run."""
    scatter = np.array([SCATTER[axis] for axis in (*AXES[:n_axes], "loss")])
    return Scales(noise or NOISE, MISFIT, scatter)


@dataclass(frozen=True)
class SurfaceDistribution:
    """A normal distribution of theta: the prior, or the posterior given the runs so far."""

    centre: tuple[float, float]
    """(ln n_params, ln tokens) at which n = d = 0."""
    mean: Array
    """(P,)"""
    root: Array
    """(P, P) root of the covariance: theta = mean + root @ standard normals."""
    fit_prior: Array
    """(P, 2) mean and sd of the prior with which the runs are fitted."""
    scales: Scales
    """Noise and scatter."""
    seed: int = 0
    """Of the samples."""

    @cached_property
    def draws(self) -> Array:
        """(DRAWS, P) surfaces for which a design is optimized."""
        return self.sample(DRAWS)

    @cached_property
    def test_draws(self) -> Array:
        """(TEST_DRAWS, P) other surfaces, which evaluate it: its own ones are too optimistic."""
        return self.sample(TEST_DRAWS)

    def sample(self, n: int) -> Array:
        """(n, P) a Latin hypercube sample."""
        return self.mean + latin_normals(n, len(self.mean), self.seed) @ self.root.T

    def offset(self, n_params: float, tokens: float) -> tuple[float, float]:
        """(n, d) of a scale."""
        return math.log(n_params) - self.centre[0], math.log(tokens) - self.centre[1]

    def optimum(self, n_params: float, tokens: float) -> Array:
        """(axes,) ln optimum of the mean at a scale."""
        n, d = self.offset(n_params, tokens)
        k = len(self.scales.scatter) - 1
        return self.mean[: LAW * k].reshape(k, LAW) @ law_basis(np.array([n]), np.array([d]))[0]


def latin_normals(n: int, n_columns: int, seed: int) -> Array:
    """(n, n_columns) standard normals, a Latin hypercube sample.

    Each column holds the quantiles of n strata of equal probability once, scaled to unit variance.
    """
    from scipy.stats import norm, qmc

    sampler = qmc.LatinHypercube(n_columns, scramble=False, seed=np.random.default_rng(seed + n))
    normals = norm.ppf(sampler.random(n))
    return np.asarray(normals / normals.std(0), float)
