"""Functional forms of the loss basin over many runs, with analytic derivatives.

The relative excess of the loss above its minimum is a sum over directions in the space of log
settings (`evaluation.DIRECTIONS`). In most directions the form is `phi`, an exponential on one
side. In lr it is `knee`, a hyperbola with two slopes, which meet at the edge of stability: over a
whole sweep of lr and batch size an exponential bends too late above the optimum, and puts the
optimum a fifth too low.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune.surface.evaluation import DIRECTIONS

CLIP = 12.0
"""Largest |skew * t|: beyond it a run is far outside any basin."""

REACH = 0.06
"""Runs whose loss is more than this fraction above the lowest of their cell are not fitted."""

Array = NDArray[np.float64]


def directions(n_axes: int) -> dict[str, tuple[int, ...]]:
    """The directions that lie in the first `n_axes` axes; the first is lr."""
    return {name: d[:n_axes] for name, d in DIRECTIONS.items() if not any(d[n_axes:])}


def phi(t: Any, s: Any) -> Any:
    """(exp(s t) - 1 - s t) / s**2, which is t**2 / 2 at s = 0."""
    u = np.clip(np.asarray(s) * t, -60.0, 60.0)
    small = np.abs(u) < 1e-3
    safe = np.where(small, 1.0, u)
    return np.square(t) * np.where(small, 0.5 + u / 6, (np.expm1(safe) - safe) / safe**2)


def phi_derivatives(t: Array, s: float) -> tuple[Array, Array, Array]:
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
    """A hyperbola with minimum 0 and second derivative 1 there.

        reach**2 cosh(skew)**3 (sqrt(1 + p**2) + tanh(skew) p - 1 / cosh(skew))
        p = t / reach - sinh(skew)

    It is a parabola within `reach`. Far out its slopes are in the ratio 1 + tanh(skew) above to
    1 - tanh(skew) below.

    Returns:
        The value, and its derivatives to t, skew and ln_reach.
    """
    reach, sh, ch, th = np.exp(ln_reach), np.sinh(skew), np.cosh(skew), np.tanh(skew)
    p = t / reach - sh
    root = np.sqrt(1 + p * p)
    g = root + th * p - 1 / ch
    to_p = p / root + th
    to_skew = -ch * p / root + p / ch**2 - th * ch + th / ch
    value, to_t = reach**2 * ch**3 * g, reach * ch**3 * to_p
    return value, to_t, reach**2 * ch**2 * (3 * sh * g + ch * to_skew), 2 * value - t * to_t


def basin_excess(offset: Array, shape: Array) -> tuple[Array, Array, Array]:
    """Relative excess of the loss above its minimum, and its derivatives.

    Args:
        offset: (R, axes) ln settings minus those of the optimum.
        shape: (S,) ln curvature of every direction, then skew of every direction, then ln reach of
            the first.

    Returns:
        The excess (R,), and its derivatives to offset (R, axes) and to shape (R, S).
    """
    matrix = np.array(list(directions(offset.shape[1]).values()), float)
    curvature, skew = np.exp(shape[: len(matrix)]), shape[len(matrix) : 2 * len(matrix)]
    *first, to_reach = knee(offset @ matrix[0], float(skew[0]), float(shape[-1]))
    others = zip(matrix[1:], skew[1:], strict=True)
    parts = [first, *(phi_derivatives(offset @ d, float(s)) for d, s in others)]
    value, to_t, to_skew = (
        np.column_stack([part[i] for part in parts]) * curvature for i in range(3)
    )
    return value.sum(1), to_t @ matrix, np.column_stack([value, to_skew, to_reach * curvature[0]])
