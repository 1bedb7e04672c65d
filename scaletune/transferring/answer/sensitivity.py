"""The loss lost by being off by 2x in a setting, the others held: read off the fitted basin or surface, or not said at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from scaletune.fitting.optimum.lr_basin import REACH, Basin
from scaletune.laws import surface
from scaletune.records import Fit

OFF = 2.0
AXES = {
    "lr": "lr",
    "batch": "batch_tokens",
    "wd": "weight_decay",
}  # of the joint surface -> the setting
SIDES = {"half": 1 / OFF, "double": OFF}
NO_BASIN = {
    "lr": "no cell of the fit has a basin over lr",
    "batch_tokens": "the fitted law has no basin over the batch: sweep it with lr, and fit law 'joint'",
    "weight_decay": "the fitted law has no basin over weight decay: sweep three or more in a cell with lr and batch, and fit law 'joint'",
}


def straying(fit: Fit, scale: dict[str, float], loss: float | None) -> dict[str, dict[str, Any]]:
    """setting -> {"half", "double"}: shares of the loss lost at half and at twice the value; their nats, range and source. None where no fit says."""
    found = _of_surface(fit, scale) if fit.law == "joint" else _of_cells(fit)
    return {
        name: _row(found.get(name), loss) | ({} if name in found else {"source": NO_BASIN[name]})
        for name in AXES.values()
    }


def _row(found: dict[str, Any] | None, loss: float | None) -> dict[str, Any]:
    """The shares, and in nats where the law says the loss."""
    shares = found or {"half": None, "double": None, "range": None}
    nats = {
        f"{side}_nats": shares[side] * loss if found and loss is not None else None
        for side in SIDES
    }
    return shares | nats


def _of_surface(fit: Fit, scale: dict[str, float]) -> dict[str, dict[str, Any]]:
    """From the joint surface at the target's own batch: (loss there / loss here) - 1 by its height."""
    solution = fit.solution
    vector = [*solution["vector"], *[0.0] * len(solution["scatter"])]
    _, tall = surface.optimum(
        solution, vector, {name: scale.get(name) for name in ("n_params", "tokens", "batch_tokens")}
    )
    return {
        AXES[axis]: _along(tall, i, len(solution["axes"]))
        for i, axis in enumerate(solution["axes"])
    }


def _along(tall: Callable[[list[float]], float], axis: int, n_axes: int) -> dict[str, Any]:
    shares = {
        side: math.expm1(tall([math.log(factor) * (i == axis) for i in range(n_axes)]))
        for side, factor in SIDES.items()
    }
    below = "; below 0: the fit's best lies that way" if min(shares.values()) < 0 else ""
    return shares | {
        "range": None,
        "source": f"the fitted joint surface at the target, at the batch asked{below}{_outside(shares)}",
    }


def _of_cells(fit: Fit) -> dict[str, dict[str, Any]]:
    """From the basins of the fitted cells: the median over cells, and the lowest and highest of them."""
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
    cells = f"the median of {len(basins)} cells' fitted basins, taken to be as wide at the target{_outside(middle)}"
    return {
        "lr": middle
        | {
            "range": {side: [min(values), max(values)] for side, values in shares.items()},
            "source": cells,
        }
    }


def _outside(shares: dict[str, float]) -> str:
    worst = max(shares.values())
    return (
        f"; {worst:.1%} is higher than the {REACH:.0%} that basins are fitted within: only roughly right"
        if worst > REACH
        else ""
    )
