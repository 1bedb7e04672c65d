"""The joint surface at one scale, without arrays: optimum, interval and near-optimal band of lr, batch, loss (and weight decay).

    height = sum over directions of curvature * form(t; skew),    t = direction . (x - optimum)

in shares of the floor, x in logs of the settings. Directions are those in which training goes wrong for a reason of its
own: lr (instability), batch (too few steps), lr / batch (gradient noise, arXiv:1711.00489), weight decay, lr * weight decay
(how long weights remember, arXiv:2405.13698). lr / batch is what makes the best lr rise with the batch. fitting/joint/surface.py fits it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

AXES = ("lr", "batch", "wd")
DIRECTIONS = {
    "lr": (1, 0, 0),
    "batch": (0, 1, 0),
    "ratio": (1, -1, 0),
    "wd": (0, 0, 1),
    "product": (1, 0, 1),
}  # on AXES


def exp(x: float) -> float:
    """exp that stays a finite number: an interval may be absurdly wide, JSON has no infinity."""
    return math.exp(min(max(x, -700.0), 700.0))


def predict(solution: Mapping[str, Any], scale: Mapping[str, float | None]) -> dict[str, Any]:
    """Point, interval and band of every quantity; at a batch that is asked for, the best lr and the loss there."""
    vector = [*solution["vector"], *[0.0] * len(solution["scatter"])]
    point, tall = optimum(solution, vector, scale)
    half = [solution["quantile"] * sd for sd in errors(solution, vector, scale)]
    out: dict[str, Any] = {
        "interval": {"lr": None, "batch_tokens": None, "loss": None},
        "band": {"lr": None, "batch_tokens": None},
    }
    for i, name in enumerate(("loss", "lr", "batch_tokens", "weight_decay")[: len(point)]):
        out[name] = scale.get(name) or exp(point[i])
        if not scale.get(name):
            out["interval"][name] = [exp(point[i] - half[i]), exp(point[i] + half[i])]
            ends = (
                _near(tall, i - 1, len(point) - 1, solution["band"])
                if i
                else [0.0, math.log1p(solution["band"])]
            )
            out["band"][name] = [exp(point[i] + end) for end in ends]
    return out


def errors(
    solution: Mapping[str, Any], vector: list[float], scale: Mapping[str, float | None]
) -> list[float]:
    """Standard errors of the logs that `optimum` gives, for a new cell.

    They are functions of the parameters and of the cell's own deviations from the law: the variance is the gradient's
    square in the covariance of both, the gradient by central differences.
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
    found = []
    for g in zip(*gradient, strict=True):
        law = math.fsum(
            a * b * v for a, row in zip(g, rows, strict=False) for b, v in zip(g, row, strict=False)
        )
        found.append(
            math.sqrt(
                max(law, 0.0)
                + math.fsum((a * sd) ** 2 for a, sd in zip(g[len(rows) :], own, strict=True))
            )
        )
    return found


def optimum(
    solution: Mapping[str, Any], vector: list[float], scale: Mapping[str, float | None]
) -> tuple[list[float], Callable[[list[float]], float]]:
    """[ln loss, ln lr, ln batch(, ln weight decay)] at the optimum, and ln(1 + height) at offsets of these settings from it, less its own."""
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
    floor = math.log(math.fsum(map(exp, terms))) + own[-1]
    wide = exp(value["width.n"] * n + value["width.d"] * d)
    best = [0.0] * len(axes)
    if scale["batch_tokens"]:
        best[1] = math.log(scale["batch_tokens"]) - centre[1]
        best[0] = _bisect(lambda u: height(value, [u, *best[1:]])[1] > 0, -12.0, 12.0)
    lowest = math.log1p(wide * height(value, best)[0])

    def tall(offset: list[float]) -> float:
        return (
            math.log1p(wide * height(value, [a + b for a, b in zip(best, offset, strict=True)])[0])
            - lowest
        )

    return [floor + lowest, *(c + b for c, b in zip(centre, best, strict=True))], tall


def height(value: Mapping[str, float], offset: list[float]) -> tuple[float, float]:
    """Height of the basin in shares of the floor, and its slope in ln lr: fitting/joint/basin.py, without arrays."""
    skew, reach = value["skew.lr"], exp(value["reach.lr"])
    p = offset[0] / reach - math.sinh(skew)
    root, ch, th, bend = (
        math.hypot(1.0, p),
        math.cosh(skew),
        math.tanh(skew),
        exp(value["curvature.lr"]),
    )
    total = bend * reach**2 * ch**3 * (root + th * p - 1 / ch)
    slope = bend * reach * ch**3 * (p / root + th)
    for name, direction in list(DIRECTIONS.items())[1:]:
        if f"skew.{name}" in value:
            t, s, bend = (
                math.fsum(a * b for a, b in zip(direction, offset, strict=False)),
                value[f"skew.{name}"],
                exp(value[f"curvature.{name}"]),
            )
            s = s if abs(s) > 1e-4 else 1e-4
            rise = math.expm1(min(max(s * t, -60.0), 60.0))
            total += bend * (rise - s * t) / s**2
            slope += bend * direction[0] * rise / s
    return total, slope


def _near(
    tall: Callable[[list[float]], float], axis: int, n_axes: int, share: float
) -> list[float]:
    """How far below and above the optimum, in the log of one setting, loss has risen by `share`."""

    def outside(t: float, sign: int) -> bool:
        return tall([sign * t * (i == axis) for i in range(n_axes)]) > math.log1p(share)

    return [
        -_bisect(lambda t: outside(t, -1), 0.0, 12.0),
        _bisect(lambda t: outside(t, 1), 0.0, 12.0),
    ]


def _bisect(above: Callable[[float], bool], low: float, high: float) -> float:
    """Where `above` turns true."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return (low + high) / 2
