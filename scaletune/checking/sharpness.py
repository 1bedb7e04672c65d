"""Sharpness over training: the Hessian's top eigenvalue at several widths, raw and as the optimizer sees it.

Where a parametrization transfers its learning rate, sharpness does not answer to width through training (arXiv:2402.17457). Groups of
different lr have no sharpness in common but in coordinates divided by sqrt(lr / P), P being Adam's divisor, or 1 of SGD: there every
tensor is trained at lr 1, and equivalent forms (a tensor as theta * W) give one number. Three are reported:
raw: of the Hessian as it is, which answers to the form.
preconditioned: P entry by entry, to be held against the threshold of stability, 2 of gradient descent, 38 of Adam (arXiv:2207.14484).
scaled: P's root mean square in each tensor. It is judged: entry by entry a few nearly dead weights of tiny gradient make the top
eigenvalue, the more of them the wider the model. Under SGD both are one.
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
from scaletune.checking.slope_fit import Asked
from scaletune.checking.target import Run, Subject, scalar_loss, steady, trained

STEPS = (4, 10, 20)  # Adam's divisor has seen a few gradients by then
TOLERANCE, VECTORS, RESTARTS = (
    1e-2,
    8,
    100,
)  # relative, of the eigenvalue; that Lanczos keeps; before it gives up
Vector = NDArray[np.float64]


def hessian(
    loss: Tensor, parameters: Sequence[Tensor], scales: Sequence[Tensor]
) -> Callable[[Vector], Vector]:
    """v -> scale * H(scale * v), entry by entry: one more backward pass through the gradient's graph each."""
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
        return (
            torch.cat([(c * s).reshape(-1) for c, s in zip(columns, scales, strict=True)])
            .double()
            .cpu()
            .numpy()
        )

    return product


def top_eigenvalue(product: Callable[[Vector], Vector], n: int) -> float:
    """The largest eigenvalue of a symmetric map of n dimensions, by ARPACK's Lanczos; NaN where the map is not finite, or does not converge."""
    start = np.random.default_rng(0).standard_normal(n)
    if not np.isfinite(product(start)).all():
        return math.nan
    try:
        values = eigsh(
            LinearOperator((n, n), matvec=product, dtype=np.float64), k=1, which="LA", v0=start, tol=TOLERANCE,
            ncv=min(VECTORS, n), maxiter=RESTARTS, return_eigenvectors=False,
        )  # fmt: skip
    except ArpackNoConvergence:
        return math.nan
    except ArpackError:  # a map that stops being finite on the way
        return math.nan
    return float(values[0])


KINDS = ("raw", "preconditioned", "scaled")


def sharpness(subject: Subject, run: Run, batch: Any, kind: str) -> float:
    """Of the loss on a batch, over every parameter that is trained; `kind` is one of KINDS."""
    weights = preconditioner.weights(run, by_tensor=kind == "scaled")
    parameters = [p for p in run.model.parameters() if id(p) in weights and p.requires_grad]
    scales = [torch.ones_like(p) if kind == "raw" else weights[id(p)].sqrt() for p in parameters]
    with (
        steady(run.model, 0),
        sdpa_kernel(SDPBackend.MATH),
    ):  # a fused attention's backward pass has no derivative
        loss = scalar_loss(subject, run.model, batch)
        return top_eigenvalue(hessian(loss, parameters, scales), sum(p.numel() for p in parameters))


def _measured(
    subject: Subject, seen: list[float], width: int, depth: int, seed: int
) -> dict[tuple[str, int], float]:
    """(kind, step) -> sharpness. `seen` gets the threshold."""
    run, batch = subject.start(width, depth, seed), subject.batch(seed)
    found: dict[tuple[str, int], float] = {}
    for step in trained(subject, run, batch, STEPS):
        found["raw", step] = sharpness(subject, run, batch, "raw")
        if preconditioner.known(run):
            found["scaled", step] = sharpness(subject, run, batch, "scaled")
            plain = all(isinstance(opt, SGD) for opt in run.optimizers)
            found["preconditioned", step] = (
                found["scaled", step] if plain else sharpness(subject, run, batch, "preconditioned")
            )
            seen.append(preconditioner.threshold(run))
    return found


def check(subject: Subject, asked: Asked) -> dict[str, Any]:
    """{"verdict", "slope", "threshold", "steps": [{"step", "raw", "preconditioned", "scaled", "slope", "slope_raw", "spread"}], "finding",
    "caveats"}: slope and spread (largest over smallest) of the scaled sharpness across sizes, of the raw one where an optimizer is neither
    SGD nor Adam and has no diagonal to scale by. The verdict is on the mean |slope| over steps.
    """
    seen: list[float] = []
    sizes = slope_fit.over_seeds(
        asked, lambda *point: _measured(subject, seen, *point), "sharpness"
    )
    rows = [
        _row(step, asked.sizes, {kind: sizes.get((kind, step)) for kind in KINDS}) for step in STEPS
    ]
    slope = sum(abs(row["slope"]) for row in rows) / len(rows)
    raw = (
        []
        if seen
        else [
            "an optimizer other than SGD and Adam has no diagonal to scale by: the raw Hessian is judged"
        ]
    )
    return {
        "verdict": slope_fit.verdict(slope), "slope": slope, "threshold": min(seen, default=None), "steps": rows,
        "finding": _finding(slope, rows, asked.over), "caveats": subject.caveats + raw,
    }  # fmt: skip


def _row(step: int, sizes: Sequence[int], found: dict[str, list[float] | None]) -> dict[str, Any]:
    judged = found["scaled"] or found["raw"]
    assert judged is not None and found["raw"] is not None
    slope = slope_fit.slope(sizes, judged)
    spread = max(judged) / min(judged) if math.isfinite(slope) else math.inf
    return {
        "step": step,
        **found,
        "slope": slope,
        "slope_raw": slope_fit.slope(sizes, found["raw"]),
        "spread": spread,
    }


def _finding(slope: float, rows: Sequence[dict[str, Any]], over: str) -> str:
    said = {"pass": "consistent across", "warn": "drifts with", "fail": "answers to"}[
        slope_fit.verdict(slope)
    ]
    spread = max(row["spread"] for row in rows)
    return f"sharpness {said} {over}: mean |slope| {slope:.2f}, largest over smallest at most {spread:.2g}"
