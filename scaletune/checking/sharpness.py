"""Sharpness check: the top eigenvalue of the Hessian at several sizes, during training.

If a parametrization transfers the learning rate, the sharpness stays independent of width through
training (arXiv:2402.17457). Tensors with different learning rates have comparable sharpness only in
coordinates divided by sqrt(lr / P), where P is Adam's divisor, or 1 for SGD: there every tensor has
learning rate 1, and equivalent forms give the same number. Three kinds are reported:

- raw: of the Hessian itself; it depends on the form.
- preconditioned: with P entry by entry; comparable with the stability threshold, which is 2 for
  gradient descent and 38 for Adam (arXiv:2207.14484).
- scaled: with the root mean square of P in each tensor. This one is judged, because entry by entry
  a few weights with tiny gradients dominate, and a wider model has more of them. For SGD it equals
  the preconditioned one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD

from scaletune.checking import preconditioner, slope_fit
from scaletune.checking.slope_fit import SizeGrid
from scaletune.checking.target import (
    CheckRun,
    CheckTarget,
    fixed_randomness,
    scalar_loss,
    train_steps,
)

STEPS = (4, 10, 20)
"""Steps at which the sharpness is measured: Adam's divisor has seen several gradients by then."""
KINDS = ("raw", "preconditioned", "scaled")
TOLERANCE = 1e-2
"""Relative tolerance of the eigenvalue."""
VECTORS, RESTARTS = 8, 100
"""Lanczos vectors kept, and restarts before the eigenvalue solver stops."""
Vector = NDArray[np.float64]


def hessian(
    loss: Tensor, parameters: Sequence[Tensor], scales: Sequence[Tensor]
) -> Callable[[Vector], Vector]:
    """The map v -> scale * H(scale * v), entry by entry. Each call costs one backward pass."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    sizes = [p.numel() for p in parameters]

    def product(v: Vector) -> Vector:
        parts = torch.as_tensor(v, dtype=loss.dtype, device=loss.device).reshape(-1).split(sizes)
        along = [
            part.view_as(p) * scale
            for part, p, scale in zip(parts, parameters, scales, strict=True)
        ]
        columns = torch.autograd.grad(
            gradients, parameters, along, retain_graph=True, materialize_grads=True
        )
        scaled = [(c * s).reshape(-1) for c, s in zip(columns, scales, strict=True)]
        return torch.cat(scaled).double().cpu().numpy()

    return product


def top_eigenvalue(product: Callable[[Vector], Vector], n: int) -> float:
    """The largest eigenvalue of a symmetric map of n dimensions, by ARPACK's Lanczos method.

    NaN if the map returns values that are not finite, or if the method does not converge.
    """
    start = np.random.default_rng(0).standard_normal(n)
    if not np.isfinite(product(start)).all():
        return math.nan
    try:
        values = eigsh(
            LinearOperator((n, n), matvec=product, dtype=np.float64),
            k=1,
            which="LA",
            v0=start,
            tol=TOLERANCE,
            ncv=min(VECTORS, n),
            maxiter=RESTARTS,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence:
        return math.nan
    except ArpackError:  # a later product was not finite
        return math.nan
    return float(values[0])


def sharpness(target: CheckTarget, run: CheckRun, batch: Any, kind: str) -> float:
    """The sharpness of the loss on a batch, over all trained parameters; `kind` is one of KINDS."""
    rates = preconditioner.scaled_rates(run, by_tensor=kind == "scaled")
    parameters = [p for p in run.model.parameters() if id(p) in rates and p.requires_grad]
    scales = [torch.ones_like(p) if kind == "raw" else rates[id(p)].sqrt() for p in parameters]
    # the backward pass of fused attention has no derivative
    with fixed_randomness(run.model, 0), sdpa_kernel(SDPBackend.MATH):
        loss = scalar_loss(target, run.model, batch)
        return top_eigenvalue(hessian(loss, parameters, scales), sum(p.numel() for p in parameters))


def _measure(
    target: CheckTarget, thresholds: list[float], width: int, depth: int, seed: int
) -> dict[tuple[str, int], float]:
    """The sharpness by (kind, step). The stability threshold is appended to `thresholds`."""
    run, batch = target.start(width, depth, seed), target.batch(seed)
    values: dict[tuple[str, int], float] = {}
    for step in train_steps(target, run, batch, STEPS):
        values["raw", step] = sharpness(target, run, batch, "raw")
        if preconditioner.is_diagonal(run):
            scaled = values["scaled", step] = sharpness(target, run, batch, "scaled")
            plain = all(isinstance(opt, SGD) for opt in run.optimizers)
            values["preconditioned", step] = (
                scaled if plain else sharpness(target, run, batch, "preconditioned")
            )
            thresholds.append(preconditioner.stability_threshold(run))
    return values


def check(target: CheckTarget, grid: SizeGrid) -> dict[str, Any]:
    """Runs the sharpness check.

    Returns:
        {"verdict", "slope", "threshold", "steps": [{"step", "raw", "preconditioned", "scaled",
        "slope", "slope_raw", "spread"}], "finding", "caveats"}. `slope` and `spread` (largest over
        smallest value) are those of the scaled sharpness over sizes, or of the raw one for an
        optimizer that is neither SGD nor Adam. The verdict is about the mean |slope| over steps.
    """
    thresholds: list[float] = []
    values = slope_fit.measure_sizes(
        grid, lambda *point: _measure(target, thresholds, *point), "sharpness"
    )
    rows = [
        _row(step, grid.sizes, {kind: values.get((kind, step)) for kind in KINDS}) for step in STEPS
    ]
    slope = sum(abs(row["slope"]) for row in rows) / len(rows)
    no_diagonal = (
        "the optimizer is neither SGD nor Adam, so its steps give no scale per parameter:"
        " the raw Hessian is judged"
    )
    return {
        "verdict": slope_fit.verdict(slope),
        "slope": slope,
        "threshold": min(thresholds, default=None),
        "steps": rows,
        "finding": _finding(slope, rows, grid.over),
        "caveats": target.caveats + ([] if thresholds else [no_diagonal]),
    }


def _row(step: int, sizes: Sequence[int], values: dict[str, list[float] | None]) -> dict[str, Any]:
    judged = values["scaled"] or values["raw"]
    assert judged is not None and values["raw"] is not None
    slope = slope_fit.slope(sizes, judged)
    spread = max(judged) / min(judged) if math.isfinite(slope) else math.inf
    return {
        "step": step,
        **values,
        "slope": slope,
        "slope_raw": slope_fit.slope(sizes, values["raw"]),
        "spread": spread,
    }


def _finding(slope: float, rows: Sequence[dict[str, Any]], over: str) -> str:
    relation = {"pass": "does not depend on", "warn": "depends weakly on", "fail": "depends on"}
    spread = max(row["spread"] for row in rows)
    return (
        f"the sharpness {relation[slope_fit.verdict(slope)]} {over}: mean |slope| {slope:.2f}, the"
        f" largest value is at most {spread:.2g} times the smallest"
    )
