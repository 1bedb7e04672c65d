"""Slopes over width or depth: how a measured quantity scales, and whether that passes a check."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from scaletune.errors import UserError, nearest

PASS, FAIL = 0.2, 0.4
"""A |slope| up to PASS passes; above FAIL it fails; between them is a warning."""
WIDTHS, DEPTHS, SEEDS = (32, 64, 128, 256), (2, 4, 8, 16), (0, 1, 2)
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class SizeGrid:
    """The widths, depths and seeds of the models that a check trains."""

    over: str
    """What varies: "width" or "depth"."""

    widths: list[int]
    """The widths; one width if depth varies."""

    depths: list[int]
    """The depths; one depth if width varies."""

    seeds: list[int]
    """The seeds of each model."""

    @property
    def sizes(self) -> list[int]:
        """The values of what varies."""
        return self.widths if self.over == "width" else self.depths

    @property
    def points(self) -> list[tuple[int, int]]:
        """(width, depth) of each model."""
        return [(width, depth) for width in self.widths for depth in self.depths]


def size_grid(
    over: str,
    widths: Sequence[int],
    depths: Sequence[int],
    seeds: Sequence[int],
    own: tuple[int, int],
) -> SizeGrid:
    """The models to train. `own` is (width, depth) for the dimension that does not vary.

    Raises:
        UserError: There are fewer than two sizes, no seed, or a size that is not valid.
    """
    sizes = {"width": list(widths), "depth": list(depths)}
    if over not in sizes:
        raise UserError(
            f"`over` must be 'width' or 'depth', but got {over!r}{nearest(over, sizes)}"
        )
    for size in sizes[over]:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"{over}s must be whole numbers above 0, but got {size!r}")
    if len(set(sizes[over])) < 2:
        got = ", ".join(map(str, sizes[over])) or "none"
        raise UserError(f"a slope needs two different {over}s, but got {got}")
    if not seeds:
        raise UserError("a slope needs at least one seed, but got none")
    grid = {"width": [own[0]], "depth": [own[1]], over: sorted(set(sizes[over]))}
    return SizeGrid(over, grid["width"], grid["depth"], list(seeds))


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of ln value on ln width or depth.

    It is infinite if a value is not finite or not above 0.
    """
    x, y = np.log(np.asarray(sizes, float)), np.asarray(values, float)
    if not (np.isfinite(y).all() and (y > 0).all()):
        return math.inf
    x = x - x.mean()
    return float((x * np.log(y)).sum() / (x * x).sum())


def verdict(slope: float) -> str:
    """ "pass", "warn" or "fail" for a quantity that should not depend on the size."""
    return "pass" if abs(slope) <= PASS else "warn" if abs(slope) <= FAIL else "fail"


def worst(verdicts: Sequence[str]) -> str:
    """The worst of several verdicts. "-" (not judged) does not count."""
    return next((each for each in ("fail", "warn") if each in verdicts), "pass")


def measure_sizes(
    grid: SizeGrid, measure: Callable[[int, int, int], Mapping[Key, float]], title: str
) -> dict[Key, list[float]]:
    """What `measure(width, depth, seed)` returns at each size: geometric mean over seeds, by key.

    Progress goes to stderr under `title`.
    """
    values: dict[Key, list[float]] = defaultdict(list)
    total = len(grid.points) * len(grid.seeds)
    with tqdm(
        total=total, desc=title, delay=3, mininterval=0.5, leave=False, file=sys.stderr
    ) as bar:
        for width, depth in grid.points:
            runs = []
            for seed in grid.seeds:
                bar.set_postfix_str(f"width {width}, depth {depth}, seed {seed}", refresh=False)
                runs.append(measure(width, depth, seed))
                bar.update()
            for key in runs[0]:
                logs = (math.log(max(run[key], 1e-30)) for run in runs)
                values[key].append(math.exp(sum(logs) / len(runs)))
    return dict(values)
