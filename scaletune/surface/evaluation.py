"""Evaluates the joint loss surface of a fit at one scale, without numpy.

Gives the optimum, its interval and the near-optimal band of lr, batch size, loss (and weight
decay). The relative increase of the loss above its minimum is

    sum over directions of curvature * form(t; skew),    t = direction . (x - optimum),

where x holds the logs of lr, batch size and weight decay. Each direction is a mechanism by which
training gets worse: lr (instability), batch (too few steps), lr / batch (gradient noise,
arXiv:1711.00489), weight decay, and lr * weight decay (averaging timescale of the weights,
arXiv:2405.13698). The direction lr / batch makes the optimal lr rise with the batch size.
`surface/posterior.py` fits the surface.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

AXES = ("lr", "batch", "wd")
DIRECTIONS = {  # in the coordinates of AXES
    "lr": (1, 0, 0),
    "batch": (0, 1, 0),
    "ratio": (1, -1, 0),
    "wd": (0, 0, 1),
    "product": (1, 0, 1),
}


def exp(x: float) -> float:
    """exp with a finite result for every x: very wide intervals must be valid JSON numbers."""
    return math.exp(min(max(x, -700.0), 700.0))


def predict(solution: Mapping[str, Any], scale: Mapping[str, float | None]) -> dict[str, Any]:
    """Returns point, interval and band of every quantity.

    If `scale` has batch_tokens, lr and loss are the best ones at that batch size.
    """
    vector = [*solution["vector"], *[0.0] * len(solution["scatter"])]
    point, log_excess = optimum(solution, vector, scale)
    half = [solution["quantile"] * sd for sd in standard_errors(solution, vector, scale)]
    out: dict[str, Any] = {
        "interval": {"lr": None, "batch_tokens": None, "loss": None},
        "band": {"lr": None, "batch_tokens": None},
    }
    for i, name in enumerate(("loss", "lr", "batch_tokens", "weight_decay")[: len(point)]):
        out[name] = scale.get(name) or exp(point[i])
        if not scale.get(name):
            out["interval"][name] = [exp(point[i] - half[i]), exp(point[i] + half[i])]
            ends = (
                _band(log_excess, i - 1, len(point) - 1, solution["band"])
                if i
                else [0.0, math.log1p(solution["band"])]
            )
            out["band"][name] = [exp(point[i] + end) for end in ends]
    return out


def standard_errors(
    solution: Mapping[str, Any], vector: list[float], scale: Mapping[str, float | None]
) -> list[float]:
    """Standard errors of the logs that `optimum` gives, for a new setting.

    The logs depend on the parameters of the law and on the setting's own deviations from it. The
    variance propagates the covariance of both, with a gradient by central differences.
    """
    rows = [[float(v) for v in line.split()] for line in solution["covariance"]]
    own = solution["scatter"]
    gradient = []
    for i, sd in enumerate([math.sqrt(row[i]) for i, row in enumerate(rows)] + own):
        ends = [
            optimum(
                solution, [v + sign * 0.01 * sd * (i == j) for j, v in enumerate(vector)], scale
            )[0]
            for sign in (1, -1)
        ]
        gradient.append([(up - down) / (0.02 * sd) for up, down in zip(*ends, strict=True)])
    errors = []
    for g in zip(*gradient, strict=True):
        law = math.fsum(
            a * b * v for a, row in zip(g, rows, strict=False) for b, v in zip(g, row, strict=False)
        )
        errors.append(
            math.sqrt(
                max(law, 0.0)
                + math.fsum((a * sd) ** 2 for a, sd in zip(g[len(rows) :], own, strict=True))
            )
        )
    return errors


def optimum(
    solution: Mapping[str, Any], vector: list[float], scale: Mapping[str, float | None]
) -> tuple[list[float], Callable[[list[float]], float]]:
    """The optimum, and the log of the loss increase at log offsets of the settings from it.

    Returns:
        [ln loss, ln lr, ln batch(, ln weight decay)] at the optimum, and a function
        offset -> ln(loss there / loss at the optimum).
    """
    axes, value = solution["axes"], dict(zip(solution["names"], vector, strict=False))
    own = vector[len(solution["names"]) :]
    n, d = (
        math.log(scale[c] or 1.0) - at
        for c, at in zip(("n_params", "tokens"), solution["centre"], strict=True)
    )
    centre = [
        value[f"{a}.c"] + value[f"{a}.along"] * n + value[f"{a}.D"] * (d - n) + shift
        for a, shift in zip(axes, own, strict=False)
    ]
    terms = (
        value["loss.E"],
        value["loss.A"] - value["loss.alpha"] * n,
        value["loss.B"] - value["loss.beta"] * d,
    )
    minimum = math.log(math.fsum(map(exp, terms))) + own[-1]
    width = exp(value["width.n"] * n + value["width.d"] * d)
    best = [0.0] * len(axes)
    if scale["batch_tokens"]:
        best[1] = math.log(scale["batch_tokens"]) - centre[1]
        best[0] = _bisect(lambda u: relative_excess(value, [u, *best[1:]])[1] > 0, -12.0, 12.0)
    lowest = math.log1p(width * relative_excess(value, best)[0])

    def log_excess(offset: list[float]) -> float:
        there = [a + b for a, b in zip(best, offset, strict=True)]
        return math.log1p(width * relative_excess(value, there)[0]) - lowest

    return [minimum + lowest, *(c + b for c, b in zip(centre, best, strict=True))], log_excess


def relative_excess(value: Mapping[str, float], offset: list[float]) -> tuple[float, float]:
    """Loss increase as a share of the minimum loss, and its slope in ln lr.

    The same as `basin.basin_excess`, without numpy.
    """
    skew, reach = value["skew.lr"], exp(value["reach.lr"])
    p = offset[0] / reach - math.sinh(skew)
    root, ch, th, curvature = (
        math.hypot(1.0, p),
        math.cosh(skew),
        math.tanh(skew),
        exp(value["curvature.lr"]),
    )
    total = curvature * reach**2 * ch**3 * (root + th * p - 1 / ch)
    slope = curvature * reach * ch**3 * (p / root + th)
    for name, direction in list(DIRECTIONS.items())[1:]:
        if f"skew.{name}" in value:
            t, s, curvature = (
                math.fsum(a * b for a, b in zip(direction, offset, strict=False)),
                value[f"skew.{name}"],
                exp(value[f"curvature.{name}"]),
            )
            s = s if abs(s) > 1e-4 else 1e-4
            rise = math.expm1(min(max(s * t, -60.0), 60.0))
            total += curvature * (rise - s * t) / s**2
            slope += curvature * direction[0] * rise / s
    return total, slope


def _band(
    log_excess: Callable[[list[float]], float], axis: int, n_axes: int, share: float
) -> list[float]:
    """Log offsets along one axis, below and above the optimum, where loss has risen by `share`."""

    def outside(t: float, sign: int) -> bool:
        return log_excess([sign * t * (i == axis) for i in range(n_axes)]) > math.log1p(share)

    return [
        -_bisect(lambda t: outside(t, -1), 0.0, 12.0),
        _bisect(lambda t: outside(t, 1), 0.0, 12.0),
    ]


def _bisect(above: Callable[[float], bool], low: float, high: float) -> float:
    """The point at which `above` becomes true."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return (low + high) / 2
