"""Robust costs of a residual: Huber (arXiv:2203.15556, D.3), squares as its limit, Student's t."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DELTA = 1e-3  # delta of the published fits, in ln L


@dataclass(frozen=True)
class Huber:
    """r**2 / 2 up to `delta`, delta * (|r| - delta / 2) beyond; squares for delta = inf."""

    delta: float = DELTA

    def cost(self, r: Array) -> Array:
        inside = np.minimum(np.abs(r), self.delta)
        return inside * (np.abs(r) - inside / 2)

    def slope(self, r: Array) -> tuple[Array, Array]:
        """First derivative, and second derivative: 1 inside delta and 0 outside."""
        return np.clip(r, -self.delta, self.delta), (np.abs(r) <= self.delta).astype(float)

    def stages(self, spread: float) -> list[Huber]:
        """A sequence of narrower costs that ends with this one.

        The first is nearly quadratic at residuals of size `spread`. A solver starts each stage at
        the minimum of the one before.
        """
        n = max(math.ceil(math.log(max(2 * spread / self.delta, 1.0), 4)), 0)
        return [Huber(self.delta * 4.0**k) for k in range(n, -1, -1)]


@dataclass(frozen=True)
class Student:
    """-ln of the density of Student's t, without its constant, times scale**2.

    Near 0 it is r**2 / 2 * (dof + 1) / dof.
    """

    scale: float
    """Scale of the residuals of ln L."""

    dof: float = 4.0

    def cost(self, r: Array) -> Array:
        return (self.dof + 1) / 2 * self.scale**2 * np.log1p(r**2 / (self.dof * self.scale**2))

    def slope(self, r: Array) -> tuple[Array, Array]:
        """First derivative, and second derivative, which is 0 where it would be negative."""
        near = self.dof * self.scale**2
        outer = (self.dof + 1) * self.scale**2 / (near + r**2)
        return outer * r, np.maximum(outer * (2 * near / (near + r**2) - 1), 0.0)

    def stages(self, spread: float) -> list[Huber | Student]:
        """Squares first: the cost has other minima, at which distant rows are ignored."""
        return [Huber(math.inf), self] if spread else [self]


Loss = Huber | Student
SQUARES = Huber(math.inf)
