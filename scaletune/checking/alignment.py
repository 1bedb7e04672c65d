"""Alignment: how much more than chance an update adds up with what it meets, per tensor, over training (arXiv:2407.05872).

RMS(W x) = fan_in**s * RMS(W) * RMS(x), with s = 1/2 where the two are uncorrelated ("none") and s = 1 where they line up ("full"): the
assumption that `alignment=` chooses in a form's learning rates. s is fitted over widths, so constants drop out.
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
from scaletune.checking.hooks import look
from scaletune.checking.slope_fit import Asked
from scaletune.checking.target import Run, Subject, trained
from scaletune.errors import UserError
from scaletune.parametrizing import shapes
from scaletune.parametrizing.apply import takes_multiplier

STEPS = (1, 4, 10, 20)
NEAR = 0.15  # of 1/2 or 1, for an exponent to fit an assumption
Key = tuple[
    str, str, int
]  # tensor, term ("W x", "dW x0", "W0 dx", "dW dx": 0 at initialisation, d what has changed since), step


@dataclass(frozen=True)
class Product:
    """A matrix, what it read, and the layer that multiplies the two without its bias or its multiplier."""

    layer: Any  # a copy
    weight: Tensor
    x: Tensor

    @torch.no_grad()
    def ratio(self, weight: Tensor, x: Tensor) -> float:
        """RMS(W x) / (RMS(W) RMS(x)); NaN where one of them is zero."""
        self.layer.weight.data = weight
        size = _rms(weight) * _rms(x)
        return (
            _rms(self.layer.forward(x)) / abs(getattr(self.layer, "multiplier", 1.0)) / size
            if size
            else math.nan
        )


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def _products(subject: Subject, run: Run, batch: Any) -> dict[str, Product]:
    """Tensor -> it with its last input: matrices whose fan-in grows, in layers whose product we know how to form."""
    calls = {call.name: call for call in look(subject, run, batch).calls}
    found = {}
    for name, uses in shapes.uses(run.model).items():
        use = uses[0]
        call = calls.get(use.module_name)
        if (
            run.roles[name] in ("hid", "out")
            and call is not None
            and takes_multiplier(use)
            and not use.looks_up
        ):
            layer: Any = copy.deepcopy(use.module)
            if getattr(layer, "bias", None) is not None:
                layer.bias.data.zero_()
            found[name] = Product(layer, layer.weight.detach().clone(), call.x.detach().clone())
    return found


def _ratios(old: Product, new: Product) -> Iterator[tuple[str, float]]:
    yield "W x", new.ratio(new.weight, new.x)
    yield "dW x0", new.ratio(new.weight - old.weight, old.x)
    yield "W0 dx", new.ratio(old.weight, new.x - old.x)
    yield "dW dx", new.ratio(new.weight - old.weight, new.x - old.x)


def _fan_in(run: Run, name: str) -> int:
    use = shapes.uses(run.model)[name][0]
    assert use.axes is not None and use.axes[0] is not None
    weight = shapes.named(run.model)[name]
    return weight.shape[use.axes[0]]


def _measured(
    subject: Subject, fans: dict[str, dict[int, int]], width: int, depth: int, seed: int
) -> dict[Key, float]:
    """(tensor, term, step) -> the ratio. `fans` gets each tensor's fan-in."""
    run, batch = subject.start(width, depth, seed), subject.batch(seed)
    old = _products(subject, run, batch)
    if not old:
        raise UserError(
            "alignment needs a linear or convolutional layer whose fan-in grows, but the model has none"
        )
    for name in old:
        fans.setdefault(name, {})[width] = _fan_in(run, name)
    found: dict[Key, float] = {}
    for step in trained(subject, run, batch, STEPS):
        new = _products(subject, run, batch)
        found |= {
            (name, term, step): ratio
            for name in old
            for term, ratio in _ratios(old[name], new[name])
        }
    return found


def check(subject: Subject, asked: Asked) -> dict[str, Any]:
    """{"verdict": "full" | "none" | "between" | "neither" | "-", "tensors": [{"tensor", "term", "step", "ratios", "exponent", "fits"}], "finding",
    "caveats"}: what fits the updates, by the median exponent over tensors of "dW x0" at the last step. Over width only.
    """
    if asked.over != "width":
        raise UserError(
            "alignment is an exponent of the fan-in, which grows with width: over='depth' has none"
        )
    fans: dict[str, dict[int, int]] = {}
    sizes = slope_fit.over_seeds(
        asked, lambda *point: _measured(subject, fans, *point), "alignment"
    )
    rows = [
        _row(key, [fans[key[0]][width] for width in asked.widths], ratios)
        for key, ratios in sizes.items()
    ]
    updates = [
        row
        for row in rows
        if row["term"] == "dW x0" and row["step"] == STEPS[-1] and row["fits"] != "-"
    ]
    return {
        "verdict": _verdict(updates),
        "tensors": rows,
        "finding": _finding(updates),
        "caveats": subject.caveats,
    }


def _row(key: Key, fans: Sequence[int], ratios: list[float]) -> dict[str, Any]:
    tensor, term, step = key
    exponent = slope_fit.slope(fans, ratios)
    return {
        "tensor": tensor,
        "term": term,
        "step": step,
        "ratios": ratios,
        "exponent": exponent,
        "fits": fits(exponent),
    }


def fits(exponent: float) -> str:
    """The assumption an exponent agrees with; "-" of what has not changed, or is not finite."""
    if not math.isfinite(exponent):
        return "-"
    return next(
        (name for name, s in (("full", 1.0), ("none", 0.5)) if abs(exponent - s) <= NEAR),
        "between" if 0.5 < exponent < 1 else "neither",
    )


def _median(rows: Sequence[dict[str, Any]]) -> float:
    ordered = sorted(row["exponent"] for row in rows)
    return ordered[len(ordered) // 2] if ordered else math.nan


def _verdict(updates: Sequence[dict[str, Any]]) -> str:
    return fits(_median(updates))


def _finding(updates: Sequence[dict[str, Any]]) -> str:
    if not updates:
        return "no update to measure: nothing was trained"
    counts = {
        name: sum(row["fits"] == name for row in updates)
        for name in ("full", "between", "none", "neither")
    }
    each = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"updates meet their inputs with exponent {_median(updates):.2f} at step {STEPS[-1]}, the median of {len(updates)} tensors ({each})"
