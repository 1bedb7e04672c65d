"""The cost of a study, run by run.

Token horizons of one trial share a trunk, so what a run adds depends on the runs before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.surface.model import SurfaceRuns

Array = NDArray[np.float64]
Indices = NDArray[np.int_]


@dataclass(frozen=True)
class Candidates:
    """R runs that could be trained, sorted by cell, and the cost of each."""

    runs: SurfaceRuns
    """The losses are not read."""
    cost: Array
    """(R,) FLOPs or seconds, of all seeds."""
    target: tuple[float, float]
    """n, d as in `runs`."""
    seeds: int = 1
    """Of each run."""
    trunk: Indices | None = None
    """(R,) equal for horizons of one trial; None: no trunk is shared."""
    stable: Array | None = None
    """(R,) the part of `cost` that a longer horizon of the trial includes."""


class Prices:
    """What each candidate adds to the cost of the runs taken.

    A shorter horizon of a trial that is taken adds its cooldown only.
    """

    def __init__(self, candidates: Candidates):
        self.candidates, self.now = candidates, candidates.cost.copy()
        self.longest: dict[int, int] = {}  # trunk -> the longest run taken

    def take(self, i: int) -> float:
        """Adds run i and returns its price.

        All runs of a trunk except the longest cost only what comes after their stable phase.
        """
        price, trunk, stable = float(self.now[i]), self.candidates.trunk, self.candidates.stable
        if trunk is not None and stable is not None:
            cost, own = self.candidates.cost, np.flatnonzero(trunk == trunk[i])
            top = max(i, self.longest.get(int(trunk[i]), i), key=lambda run: cost[run])
            self.longest[int(trunk[i])] = top
            self.now[own] = cost[own] - np.where(cost[own] > cost[top], stable[top], stable[own])
        return price


def added(candidates: Candidates, order: Indices) -> Array:
    """(len(order),) what each run adds to the cost of the runs before it."""
    prices = Prices(candidates)
    return np.array([prices.take(int(i)) for i in order])
