"""Alignment check: how strongly weight updates are correlated with their inputs (arXiv:2407.05872).

RMS(W x) = fan_in**s * RMS(W) * RMS(x), with s = 1/2 if W and x are uncorrelated ("none") and s = 1
if they are aligned ("full"). `alignment=` of `parametrize` chooses one of the two for the learning
rates. s is fitted over widths, so that constants cancel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaletune.checking import slope_fit
from scaletune.checking.hooks import run_forward
from scaletune.checking.slope_fit import SizeGrid
from scaletune.checking.target import CheckRun, CheckTarget, train_steps
from scaletune.errors import UserError
from scaletune.parametrizing import shapes
from scaletune.parametrizing.apply import takes_multiplier

STEPS = (1, 4, 10, 20)
NEAR = 0.15
"""Distance from 1/2 or 1 within which an exponent matches an assumption."""
Key = tuple[str, str, int]
"""(tensor, term, step). Terms: "W x", "dW x0", "W0 dx", "dW dx", where 0 means at initialisation
and d means the change since then."""


@dataclass(frozen=True)
class LinearProduct:
    """A matrix, its input, and the layer that multiplies the two."""

    layer: Any
    """A copy of the layer, without bias."""

    weight: Tensor
    """The matrix."""

    x: Tensor
    """The input of the layer."""

    @torch.no_grad()
    def ratio(self, weight: Tensor, x: Tensor) -> float:
        """RMS(W x) / (RMS(W) RMS(x)), without the layer's multiplier; NaN for a zero W or x."""
        self.layer.weight.data = weight
        size = _rms(weight) * _rms(x)
        if not size:
            return math.nan
        return _rms(self.layer.forward(x)) / abs(getattr(self.layer, "multiplier", 1.0)) / size


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def _products(target: CheckTarget, run: CheckRun, batch: Any) -> dict[str, LinearProduct]:
    """The product of each matrix whose fan-in grows, in linear and convolutional layers."""
    calls = {call.name: call for call in run_forward(target, run, batch).calls}
    products = {}
    for name, uses in shapes.tensor_uses(run.model).items():
        use = uses[0]
        call = calls.get(use.module_name)
        matrix = run.roles[name] in ("hid", "out") and not use.is_embedding
        if matrix and call is not None and takes_multiplier(use):
            layer: Any = copy.deepcopy(use.module)
            if getattr(layer, "bias", None) is not None:
                layer.bias.data.zero_()
            weight = layer.weight.detach().clone()
            products[name] = LinearProduct(layer, weight, call.x.detach().clone())
    return products


def _ratios(old: LinearProduct, new: LinearProduct) -> Iterator[tuple[str, float]]:
    yield "W x", new.ratio(new.weight, new.x)
    yield "dW x0", new.ratio(new.weight - old.weight, old.x)
    yield "W0 dx", new.ratio(old.weight, new.x - old.x)
    yield "dW dx", new.ratio(new.weight - old.weight, new.x - old.x)


def _fan_in(run: CheckRun, name: str) -> int:
    use = shapes.tensor_uses(run.model)[name][0]
    assert use.axes is not None and use.axes[0] is not None
    weight = shapes.named_tensors(run.model)[name]
    return weight.shape[use.axes[0]]


def _measure(
    target: CheckTarget, fan_ins: dict[str, dict[int, int]], width: int, depth: int, seed: int
) -> dict[Key, float]:
    """The ratio by (tensor, term, step). Each tensor's fan-in is added to `fan_ins`."""
    run, batch = target.start(width, depth, seed), target.batch(seed)
    old = _products(target, run, batch)
    if not old:
        raise UserError(
            "alignment needs a linear or convolutional layer whose fan-in grows, but the model has"
            " none"
        )
    for name in old:
        fan_ins.setdefault(name, {})[width] = _fan_in(run, name)
    ratios: dict[Key, float] = {}
    for step in train_steps(target, run, batch, STEPS):
        new = _products(target, run, batch)
        ratios |= {
            (name, term, step): ratio
            for name in old
            for term, ratio in _ratios(old[name], new[name])
        }
    return ratios


def check(target: CheckTarget, grid: SizeGrid) -> dict[str, Any]:
    """Runs the alignment check, over width only.

    Returns:
        {"verdict": "full" | "none" | "between" | "neither" | "-", "tensors": [{"tensor", "term",
        "step", "ratios", "exponent", "fits"}], "finding", "caveats"}. The verdict is about the
        median over tensors of the exponent of "dW x0" at the last step.

    Raises:
        UserError: The check is over depth, or the model has no matrix whose fan-in grows.
    """
    if grid.over != "width":
        raise UserError(
            "the alignment exponent compares fan-ins, which grow with width, but got over='depth':"
            " use over='width'"
        )
    fan_ins: dict[str, dict[int, int]] = {}
    values = slope_fit.measure_sizes(
        grid, lambda *point: _measure(target, fan_ins, *point), "alignment"
    )
    rows = [
        _row(key, [fan_ins[key[0]][width] for width in grid.widths], ratios)
        for key, ratios in values.items()
    ]
    updates = [
        row
        for row in rows
        if row["term"] == "dW x0" and row["step"] == STEPS[-1] and row["fits"] != "-"
    ]
    return {
        "verdict": assumption(_median(updates)),
        "tensors": rows,
        "finding": _finding(updates),
        "caveats": target.caveats,
    }


def _row(key: Key, fan_ins: Sequence[int], ratios: list[float]) -> dict[str, Any]:
    tensor, term, step = key
    exponent = slope_fit.slope(fan_ins, ratios)
    return {
        "tensor": tensor,
        "term": term,
        "step": step,
        "ratios": ratios,
        "exponent": exponent,
        "fits": assumption(exponent),
    }


def assumption(exponent: float) -> str:
    """The assumption that an exponent matches: "full", "none", "between" or "neither".

    "-" for an exponent that is not finite, as for a tensor that has not changed.
    """
    if not math.isfinite(exponent):
        return "-"
    if abs(exponent - 1.0) <= NEAR:
        return "full"
    if abs(exponent - 0.5) <= NEAR:
        return "none"
    return "between" if 0.5 < exponent < 1 else "neither"


def _median(rows: Sequence[dict[str, Any]]) -> float:
    ordered = sorted(row["exponent"] for row in rows)
    return ordered[len(ordered) // 2] if ordered else math.nan


def _finding(updates: Sequence[dict[str, Any]]) -> str:
    if not updates:
        return "no weight update could be measured: no tensor changed, or training diverged"
    names = ("full", "between", "none", "neither")
    counts = {name: sum(row["fits"] == name for row in updates) for name in names}
    each = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return (
        f"exponent of weight updates on their inputs at step {STEPS[-1]}: median"
        f" {_median(updates):.2f} over {len(updates)} tensors ({each});"
        " 1 is full alignment, 0.5 is none"
    )
