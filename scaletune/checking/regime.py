"""Feature learning or kernel regime: how far the last features, and the empirical NTK, move in training as width grows.

With feature learning both move by the same share at any width (arXiv:2011.14522); in the kernel limit features move ~ width**-1/2 and
the kernel ~ width**-1/2 or faster (arXiv:1806.07572, arXiv:1902.06720). The kernel counts each tensor as its optimizer does, by
lr, over the RMS of the tensor's first gradient where steps are normalised, so equivalent forms have one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from scaletune.checking import preconditioner, slope_fit
from scaletune.checking.hooks import activations, look
from scaletune.checking.slope_fit import Asked
from scaletune.checking.target import Run, Subject, scalar_loss, steady, trained

STEPS = (0, 10, 20)  # the first is what the others are compared with
INPUTS = 8  # of the kernel: outputs on that many rows, each projected on one random direction
LEARNS, KERNEL = (
    -slope_fit.PASS,
    -0.3,
)  # slopes of the features' change: from the first on they are learned, up to the second they are not


def _weights(subject: Subject, run: Run, batch: Any) -> dict[int, float]:
    """id of a parameter -> what its gradients count in the kernel, at initialisation."""
    normalised = {
        id(p)
        for opt in run.optimizers
        if not isinstance(opt, SGD)
        for group in opt.param_groups
        for p in group["params"]
    }
    rates = preconditioner.rates(run)
    parameters = [p for p in run.model.parameters() if id(p) in rates]
    with steady(run.model, 0):
        gradients = torch.autograd.grad(
            scalar_loss(subject, run.model, batch), parameters, materialize_grads=True
        )
    sizes = {
        id(p): float(g.square().mean().sqrt()) if id(p) in normalised else 1.0
        for p, g in zip(parameters, gradients, strict=True)
    }
    return {each: rates[each] / size if size else 0.0 for each, size in sizes.items()}


def _projected(logits: Tensor) -> Tensor:
    """INPUTS scalars: rows spread over the batch, each output projected on the same direction of norm 1."""
    rows = logits.reshape(-1, logits.shape[-1])
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    where = torch.linspace(0, len(rows) - 1, min(INPUTS, len(rows))).long()
    return rows[where] @ (direction / direction.norm())


def kernel(subject: Subject, run: Run, batch: Any, weights: Mapping[int, float]) -> Tensor:
    """K_ij = sum over parameters of weight * df_i df_j, float64, [INPUTS, INPUTS]."""
    parameters = [p for p in run.model.parameters() if id(p) in weights]
    outputs = _projected(look(subject, run, batch).logits)
    rows = []
    for output in outputs:
        gradients = torch.autograd.grad(
            output, parameters, retain_graph=True, materialize_grads=True
        )
        rows.append(
            torch.cat(
                [
                    (g * weights[id(p)] ** 0.5).reshape(-1)
                    for p, g in zip(parameters, gradients, strict=True)
                ]
            ).double()
        )
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def _features(subject: Subject, run: Run, batch: Any) -> Tensor:
    with torch.no_grad():
        return activations(look(subject, run, batch))["final"].double().clone()


def _change(now: Tensor, start: Tensor) -> float:
    return float((now - start).norm() / start.norm())


def _measured(subject: Subject, width: int, depth: int, seed: int) -> dict[tuple[str, int], float]:
    """("features" | "kernel", step) -> its relative change since initialisation."""
    run, batch = subject.start(width, depth, seed), subject.batch(seed)
    weights = _weights(subject, run, batch)
    features, first = _features(subject, run, batch), kernel(subject, run, batch, weights)
    found: dict[tuple[str, int], float] = {}
    for step in trained(subject, run, batch, STEPS[1:]):
        found["features", step] = _change(_features(subject, run, batch), features)
        found["kernel", step] = _change(kernel(subject, run, batch, weights), first)
    return found


def check(subject: Subject, asked: Asked) -> dict[str, Any]:
    """{"verdict": "feature learning" | "kernel regime" | "between" | "unstable", "changes": [{"of", "step", "relative", "slope"}], "finding",
    "caveats"}; the verdict is by the slope of the last features' relative change at the last step.
    """
    sizes = slope_fit.over_seeds(asked, lambda *point: _measured(subject, *point), "regime")
    rows: list[dict[str, Any]] = [
        {
            "of": of,
            "step": step,
            "relative": relative,
            "slope": slope_fit.slope(asked.sizes, relative),
        }
        for (of, step), relative in sizes.items()
    ]
    last = {row["of"]: row["slope"] for row in rows if row["step"] == STEPS[-1]}
    verdict = regime(last["features"])
    finding = f"{verdict}: relative change ~ {asked.over}**{last['features']:+.2f} of the last features, **{last['kernel']:+.2f} of the NTK"
    return {
        "verdict": verdict,
        "changes": rows,
        "finding": f"{finding}, at step {STEPS[-1]}",
        "caveats": subject.caveats,
    }


def regime(slope: float) -> str:
    """By the exponent over width of how far features move, relative to their size."""
    if slope > slope_fit.PASS:
        return "unstable"
    return (
        "feature learning" if slope >= LEARNS else "kernel regime" if slope <= KERNEL else "between"
    )
