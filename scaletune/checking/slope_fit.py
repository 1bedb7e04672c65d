"""Slopes over width or depth: how a measured size answers to the number that varies, and whether it should have."""

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

PASS, FAIL = 0.2, 0.4  # |slope| that passes, and above which a check fails
WIDTHS, DEPTHS, SEEDS = (32, 64, 128, 256), (2, 4, 8, 16), (0, 1, 2)
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Asked:
    """What varies, and over which models: one width, or one depth, where the other varies."""

    over: str  # "width" | "depth"
    widths: list[int]
    depths: list[int]
    seeds: list[int]

    @property
    def sizes(self) -> list[int]:
        return self.widths if self.over == "width" else self.depths

    @property
    def points(self) -> list[tuple[int, int]]:
        """(width, depth) of each model."""
        return [(width, depth) for width in self.widths for depth in self.depths]


def asked(
    over: str,
    widths: Sequence[int],
    depths: Sequence[int],
    seeds: Sequence[int],
    own: tuple[int, int],
) -> Asked:
    """The models to train: `own` is the (width, depth) that does not vary. UserError where no slope can come of it."""
    given = {"width": list(widths), "depth": list(depths)}
    if over not in given:
        raise UserError(f"`over` must be one we know, but got {over!r}{nearest(over, given)}")
    if low := [
        size
        for size in given[over]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1
    ]:
        raise UserError(f"{over}s must be whole numbers above 0, but got {low[0]!r}")
    if len(set(given[over])) < 2:
        raise UserError(
            f"a slope needs two {over}s that differ, but got {', '.join(map(str, given[over])) or 'none'}"
        )
    if not seeds:
        raise UserError("a slope needs a seed, but got none")
    fixed = {"width": [own[0]], "depth": [own[1]], over: sorted(set(given[over]))}
    return Asked(over, fixed["width"], fixed["depth"], list(seeds))


def slope(points: Sequence[float], sizes: Sequence[float]) -> float:
    """Least-squares slope of ln size on ln width or depth; infinite when a size is not finite, or not above 0."""
    x, y = np.log(np.asarray(points, float)), np.asarray(sizes, float)
    if not (np.isfinite(y).all() and (y > 0).all()):
        return math.inf
    x = x - x.mean()
    return float((x * np.log(y)).sum() / (x * x).sum())


def verdict(slope: float) -> str:
    """ "pass", "warn" or "fail" of what should not answer to the size at all."""
    return "pass" if abs(slope) <= PASS else "warn" if abs(slope) <= FAIL else "fail"


def worst(verdicts: Sequence[str]) -> str:
    """The verdict of the whole; what is not judged ("-") does not count."""
    return next((each for each in ("fail", "warn") if each in verdicts), "pass")


def over_seeds(
    asked: Asked, measure: Callable[[int, int, int], Mapping[Key, float]], about: str
) -> dict[Key, list[float]]:
    """key -> what `measure(width, depth, seed)` found at each size, the geometric mean over seeds. Progress goes to stderr."""
    sizes: dict[Key, list[float]] = defaultdict(list)
    with tqdm(
        total=len(asked.points) * len(asked.seeds),
        desc=about,
        delay=3,
        mininterval=0.5,
        leave=False,
        file=sys.stderr,
    ) as bar:
        for width, depth in asked.points:
            runs = []
            for seed in asked.seeds:
                bar.set_postfix_str(f"width {width}, depth {depth}, seed {seed}", refresh=False)
                runs.append(measure(width, depth, seed))
                bar.update()
            for key in runs[0]:
                sizes[key].append(
                    math.exp(sum(math.log(max(run[key], 1e-30)) for run in runs) / len(runs))
                )
    return dict(sizes)
