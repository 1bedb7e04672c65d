"""What a study costs, run by run: the horizons of one trial share a trunk, so what a run adds hangs on those before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.joint.surface import Runs

Array = NDArray[np.float64]
Indices = NDArray[np.int_]


@dataclass(frozen=True)
class Candidates:
    """R runs that could be trained, sorted by cell, and what each costs."""

    runs: Runs  # y is not read
    cost: Array  # (R,) FLOPs or seconds, of all its seeds
    target: tuple[float, float]  # n, d as in `runs`
    seeds: int = 1
    trunk: Indices | None = None  # (R,) alike for horizons of one trial; none: each trains apart
    stable: Array | None = None  # (R,) of `cost`, what a longer horizon spends anyway


class Prices:
    """What each candidate would add to the cost of those taken: a shorter horizon of one that is there, its cooldown alone."""

    def __init__(self, candidates: Candidates):
        self.candidates, self.now = candidates, candidates.cost.copy()
        self.longest: dict[int, int] = {}  # trunk -> the run taken

    def take(self, i: int) -> float:
        """Pay for run i. Of a trunk's runs all but the longest cost what comes after their stable phase."""
        paid, trunk, stable = float(self.now[i]), self.candidates.trunk, self.candidates.stable
        if trunk is not None and stable is not None:
            cost, own = self.candidates.cost, np.flatnonzero(trunk == trunk[i])
            top = max(i, self.longest.get(int(trunk[i]), i), key=lambda run: cost[run])
            self.longest[int(trunk[i])] = top
            self.now[own] = cost[own] - np.where(cost[own] > cost[top], stable[top], stable[own])
        return paid


def added(candidates: Candidates, order: Indices) -> Array:
    """(len(order),): what each run adds to the cost of those before it."""
    prices = Prices(candidates)
    return np.array([prices.take(int(i)) for i in order])
