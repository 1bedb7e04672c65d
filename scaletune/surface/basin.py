"""The height of the joint surface over many runs, with its derivatives; laws/surface.py says what it is made of.

In most directions the form is `phi` of optimum.py; in lr it is `knee`, two slopes joined at the edge of stability: over a
whole sweep of lr and batch an exponential bends too late above the optimum, and puts the optimum a fifth too low.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.optimum.lr_basin import phi
from scaletune.laws.surface import DIRECTIONS

CLIP = 12.0  # of skew * t: beyond it a run is far outside any basin

Array = NDArray[np.float64]


def directions(n_axes: int) -> dict[str, tuple[int, ...]]:
    """The directions that lie in the first `n_axes` axes; the first is lr."""
    return {name: d[:n_axes] for name, d in DIRECTIONS.items() if not any(d[n_axes:])}


def phi_slopes(t: Array, s: float) -> tuple[Array, Array, Array]:
    """`phi` at t, and its derivatives to t and to s."""
    t = np.clip(t, -CLIP / max(abs(s), 1e-9), CLIP / max(abs(s), 1e-9))
    value = phi(t, s)
    small = np.abs(s * t) < 1e-3
    safe = s if s else 1.0
    rise = np.expm1(s * t)
    to_t = np.where(small, t + s * t**2 / 2, rise / safe)
    to_s = np.where(small, t**3 / 6 + s * t**4 / 12, (t * rise - 2 * s * value) / safe**2)
    return value, to_t, to_s


def knee(t: Array, skew: float, ln_reach: float) -> tuple[Array, Array, Array, Array]:
    """A hyperbola with second derivative 1 at its minimum 0, and its derivatives to t, skew and ln_reach.

    reach**2 cosh(skew)**3 (sqrt(1 + p**2) + tanh(skew) p - 1 / cosh(skew)),    p = t / reach - sinh(skew):
    slopes far out are as 1 + tanh(skew) above to 1 - tanh(skew) below; a parabola within `reach`.
    """
    reach, sh, ch, th = np.exp(ln_reach), np.sinh(skew), np.cosh(skew), np.tanh(skew)
    p = t / reach - sh
    root = np.sqrt(1 + p * p)
    g, to_p, to_skew = (
        root + th * p - 1 / ch,
        p / root + th,
        -ch * p / root + p / ch**2 - th * ch + th / ch,
    )
    value, to_t = reach**2 * ch**3 * g, reach * ch**3 * to_p
    return value, to_t, reach**2 * ch**2 * (3 * sh * g + ch * to_skew), 2 * value - t * to_t


def height(offset: Array, shape: Array) -> tuple[Array, Array, Array]:
    """Height (R,) at offsets (R, axes) from the optimum, its derivatives to offset (R, axes) and to shape (R, S).

    shape: ln curvature of every direction, then skew of every direction, then ln reach of the first.
    """
    matrix = np.array(list(directions(offset.shape[1]).values()), float)
    curvature, skew = np.exp(shape[: len(matrix)]), shape[len(matrix) : 2 * len(matrix)]
    *first, to_reach = knee(offset @ matrix[0], float(skew[0]), float(shape[-1]))
    parts = [
        first,
        *(phi_slopes(offset @ d, float(s)) for d, s in zip(matrix[1:], skew[1:], strict=True)),
    ]
    value, to_t, to_skew = (
        np.column_stack([part[i] for part in parts]) * curvature for i in range(3)
    )
    return value.sum(1), to_t @ matrix, np.column_stack([value, to_skew, to_reach * curvature[0]])
