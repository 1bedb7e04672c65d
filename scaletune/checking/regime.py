"""Regime check: feature learning or kernel regime.

It measures how far the last features and the empirical neural tangent kernel (NTK) change in
training, relative to their size, as the model grows. With feature learning both change by the same
relative amount at any width (arXiv:2011.14522). In the kernel limit features change ~ width**-1/2
and the kernel ~ width**-1/2 or faster (arXiv:1806.07572, arXiv:1902.06720). The kernel weights each
tensor as its optimizer does: by lr, divided by the RMS of the tensor's first gradient if the
optimizer normalises its steps. Equivalent forms then have the same kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from scaletune.checking import preconditioner, slope_fit
from scaletune.checking.hooks import activations, run_forward
from scaletune.checking.slope_fit import SizeGrid
from scaletune.checking.target import (
    CheckRun,
    CheckTarget,
    fixed_randomness,
    scalar_loss,
    train_steps,
)

STEPS = (0, 10, 20)
"""Changes are measured from the first of these steps."""
INPUTS = 8
"""Rows of the batch whose outputs define the kernel; each is projected on one random direction."""
LEARNS, KERNEL = -slope_fit.PASS, -0.3
"""Slopes of the features' change: above LEARNS features are learned, below KERNEL they are not."""


def _tensor_weights(target: CheckTarget, run: CheckRun, batch: Any) -> dict[int, float]:
    """Weight of each parameter's gradient in the kernel at initialisation, by the id."""
    normalised = {
        id(p)
        for opt in run.optimizers
        if not isinstance(opt, SGD)
        for group in opt.param_groups
        for p in group["params"]
    }
    rates = preconditioner.learning_rates(run)
    parameters = [p for p in run.model.parameters() if id(p) in rates]
    with fixed_randomness(run.model, 0):
        gradients = torch.autograd.grad(
            scalar_loss(target, run.model, batch), parameters, materialize_grads=True
        )
    sizes = {
        id(p): float(g.square().mean().sqrt()) if id(p) in normalised else 1.0
        for p, g in zip(parameters, gradients, strict=True)
    }
    return {each: rates[each] / size if size else 0.0 for each, size in sizes.items()}


def _project(logits: Tensor) -> Tensor:
    """INPUTS scalars: outputs at rows spread over the batch, projected on one unit direction."""
    rows = logits.reshape(-1, logits.shape[-1])
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    where = torch.linspace(0, len(rows) - 1, min(INPUTS, len(rows))).long()
    return rows[where] @ (direction / direction.norm())


def kernel(target: CheckTarget, run: CheckRun, batch: Any, weights: Mapping[int, float]) -> Tensor:
    """K_ij = sum over parameters of weight * df_i df_j, float64, [INPUTS, INPUTS]."""
    parameters = [p for p in run.model.parameters() if id(p) in weights]
    outputs = _project(run_forward(target, run, batch).logits)
    rows = []
    for output in outputs:
        gradients = torch.autograd.grad(
            output, parameters, retain_graph=True, materialize_grads=True
        )
        pairs = zip(parameters, gradients, strict=True)
        rows.append(torch.cat([(g * weights[id(p)] ** 0.5).reshape(-1) for p, g in pairs]).double())
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def _features(target: CheckTarget, run: CheckRun, batch: Any) -> Tensor:
    with torch.no_grad():
        return activations(run_forward(target, run, batch))["final"].double().clone()


def _relative_change(now: Tensor, start: Tensor) -> float:
    return float((now - start).norm() / start.norm())


def _measure(
    target: CheckTarget, width: int, depth: int, seed: int
) -> dict[tuple[str, int], float]:
    """Relative change since initialisation by ("features" | "kernel", step)."""
    run, batch = target.start(width, depth, seed), target.batch(seed)
    weights = _tensor_weights(target, run, batch)
    features, first = _features(target, run, batch), kernel(target, run, batch, weights)
    changes: dict[tuple[str, int], float] = {}
    for step in train_steps(target, run, batch, STEPS[1:]):
        changes["features", step] = _relative_change(_features(target, run, batch), features)
        changes["kernel", step] = _relative_change(kernel(target, run, batch, weights), first)
    return changes


def check(target: CheckTarget, grid: SizeGrid) -> dict[str, Any]:
    """Runs the regime check.

    Returns:
        {"verdict": "feature learning" | "kernel regime" | "between" | "unstable", "changes":
        [{"of", "step", "relative", "slope"}], "finding", "caveats"}. The verdict is about the slope
        of the last features' relative change at the last step.
    """
    values = slope_fit.measure_sizes(grid, lambda *point: _measure(target, *point), "regime")
    rows: list[dict[str, Any]] = [
        {
            "of": of,
            "step": step,
            "relative": relative,
            "slope": slope_fit.slope(grid.sizes, relative),
        }
        for (of, step), relative in values.items()
    ]
    last = {row["of"]: row["slope"] for row in rows if row["step"] == STEPS[-1]}
    finding = (
        f"relative change at step {STEPS[-1]}: last features ~"
        f" {grid.over}**{last['features']:+.2f}, NTK ~ {grid.over}**{last['kernel']:+.2f}"
    )
    return {
        "verdict": regime(last["features"]),
        "changes": rows,
        "finding": finding,
        "caveats": target.caveats,
    }


def regime(slope: float) -> str:
    """The regime, from the slope over width of the features' relative change."""
    if slope > slope_fit.PASS:
        return "unstable"
    if slope >= LEARNS:
        return "feature learning"
    return "kernel regime" if slope <= KERNEL else "between"
