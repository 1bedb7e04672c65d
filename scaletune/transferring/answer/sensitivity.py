"""Computes how much the loss rises if one setting is off by a factor of 2 and the others are not.

The values come from the fitted loss basins of the settings, or from a fitted joint surface. Where
the fit has neither, they are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from scaletune.fitting.optimum.lr_basin import Basin
from scaletune.records import Fit
from scaletune.surface.basin import REACH
from scaletune.surface.evaluation import optimum

FACTOR = 2.0
SIDES = {"half": 1 / FACTOR, "double": FACTOR}
AXES = {"lr": "lr", "batch": "batch_tokens", "wd": "weight_decay"}
"""Axis of the joint surface -> setting."""

NO_BASIN = {
    "lr": "learning-rate sensitivity unknown: the fit has no loss basin over lr",
    "batch_tokens": (
        "batch sensitivity unknown: include two more batch sizes in the sweep, and fit law 'joint'"
    ),
    "weight_decay": (
        "weight-decay sensitivity unknown: sweep three or more weight decays with lr and batch"
        " size, and fit law 'joint'"
    ),
}


def loss_sensitivity(
    fit: Fit, scale: dict[str, float], loss: float | None
) -> dict[str, dict[str, Any]]:
    """Returns the relative loss increase at half and at double the optimal value.

    Args:
        fit: The fit that predicted the optimum.
        scale: n_params, tokens and batch_tokens of the target.
        loss: Expected loss in nats per token, if the fit predicts it.

    Returns:
        Setting -> `half`, `double` (fractions of the loss), `half_nats`, `double_nats`, `range`
        over the fitted settings, and `source`. None where the fit does not tell.
    """
    known = _from_surface(fit, scale) if fit.law == "joint" else _from_basins(fit)
    return {
        name: _with_nats(known.get(name), loss)
        | ({} if name in known else {"source": NO_BASIN[name]})
        for name in AXES.values()
    }


def _with_nats(row: dict[str, Any] | None, loss: float | None) -> dict[str, Any]:
    shares = row or {"half": None, "double": None, "range": None}
    nats = {
        f"{side}_nats": shares[side] * loss if row and loss is not None else None for side in SIDES
    }
    return shares | nats


def _from_surface(fit: Fit, scale: dict[str, float]) -> dict[str, dict[str, Any]]:
    """From the joint surface at the target's batch size: (loss there / loss here) - 1."""
    solution = fit.solution
    vector = [*solution["vector"], *[0.0] * len(solution["scatter"])]
    target = {name: scale.get(name) for name in ("n_params", "tokens", "batch_tokens")}
    _, log_excess = optimum(solution, vector, target)
    axes = solution["axes"]
    return {AXES[axis]: _along(log_excess, i, len(axes)) for i, axis in enumerate(axes)}


def _along(log_excess: Callable[[list[float]], float], axis: int, n_axes: int) -> dict[str, Any]:
    shares = {
        side: math.expm1(log_excess([math.log(factor) * (i == axis) for i in range(n_axes)]))
        for side, factor in SIDES.items()
    }
    negative = "; negative: the fit's optimum lies on that side" if min(shares.values()) < 0 else ""
    source = "the fitted joint surface at the target's batch size"
    return shares | {"range": None, "source": f"{source}{negative}{_beyond_reach(shares)}"}


def _from_basins(fit: Fit) -> dict[str, dict[str, Any]]:
    """From the loss basins of the fitted settings: median, lowest and highest."""
    basins = [
        Basin(**cell["basin"]) for cell in fit.cells if cell["status"] == "ok" and cell.get("basin")
    ]
    if not basins:
        return {}
    shares = {
        side: [float(basin(math.exp(basin.x) * factor)) / basin.floor - 1 for basin in basins]
        for side, factor in SIDES.items()
    }
    middle: dict[str, Any] = {side: median(values) for side, values in shares.items()}
    ranges = {side: [min(values), max(values)] for side, values in shares.items()}
    source = (
        f"median of the fitted loss basins of {len(basins)} settings, assumed to be as wide at the"
        f" target{_beyond_reach(middle)}"
    )
    return {"lr": middle | {"range": ranges, "source": source}}


def _beyond_reach(shares: dict[str, float]) -> str:
    worst = max(shares.values())
    if worst <= REACH:
        return ""
    return f"; approximate: basins are fitted up to {REACH:.0%}, and {worst:.1%} is beyond"
