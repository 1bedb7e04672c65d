"""Coordinate check: how far activations change in a few steps, against width or depth.

With the right exponents the root-mean-square change of every activation is independent of width
(arXiv:2203.03466, App. D.1), and of depth with a depth rule (arXiv:2310.02244, arXiv:2505.01618).
The readout starts at zero, because the logits of a random readout shrink with width and would add
to the change in the first steps. Tensors that do not grow at all, such as a readout's bias, are
frozen: they add the same amount to the logits at every width, which would hide the readout's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scaletune.checking import slope_fit
from scaletune.checking.bug_signatures import STEPS, diagnose
from scaletune.checking.hooks import (
    activations,
    freeze,
    normalise_embedding,
    run_forward,
    zero_readout,
)
from scaletune.checking.slope_fit import SizeGrid
from scaletune.checking.target import CheckRun, CheckTarget, train_steps
from scaletune.errors import UserError
from scaletune.rules.families import family_named
from scaletune.rules.forms import form_named


@dataclass(frozen=True)
class Slope:
    """How the change of one activation scales: d ln RMS(h_t - h_0) / d ln width (or depth)."""

    activation: str
    """"embedding", "residual", "final" or "logits"."""

    step: int
    """Number of training steps."""

    slope: float
    """Slope, from the geometric mean over seeds."""

    verdict: str
    """"pass", "warn" or "fail"; "-" for step 1, which is not judged."""


def _activations(
    target: CheckTarget, run: CheckRun, batch: Any, over: str
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        values = activations(run_forward(target, run, batch), over)
        return {name: value.detach().clone() for name, value in values.items()}


def _caveats(target: CheckTarget) -> list[str]:
    """The known caveats, and one for forms of SGD that assume a random readout.

    SGD's step is proportional to its gradient, and the gradients behind a readout of zeros are
    smaller than those behind a random one, whose std is ~ width**-1/2.
    """
    if family_named(target.family).gradient == 0 or form_named(target.form).backward >= 1:
        return target.caveats
    return [
        *target.caveats,
        f"the lr of {target.family!r} in this form is for the gradients of a random readout; this"
        " check starts the readout at zero, so all other activations change ~ width**-1/2",
    ]


def changes(
    target: CheckTarget, over: str, width: int, depth: int, seed: int
) -> dict[tuple[str, int], float]:
    """RMS over coordinates of each activation's change since initialisation, by (activation, step).

    The run trains on one batch.
    """
    run, batch = target.start(width, depth, seed), target.batch(seed)
    zero_readout(target, run, batch)
    freeze(run, "fin")
    if over == "depth":
        normalise_embedding(target, run, batch)
    start = _activations(target, run, batch, over)
    if missing := {"embedding", "residual"} - start.keys():
        role = {"embedding": "emb", "residual": "hid"}[min(missing)]
        raise UserError(
            "a coordinate check needs tensors of roles `emb` and `hid`, but the model has none of"
            f" role `{role}`: declare one with `overrides`"
        )
    result: dict[tuple[str, int], float] = {}
    for step in train_steps(target, run, batch, STEPS):
        now = _activations(target, run, batch, over)
        result |= {
            (name, step): float((now[name] - start[name]).square().mean().sqrt()) for name in now
        }
    return result


def check(target: CheckTarget, grid: SizeGrid) -> dict[str, Any]:
    """Runs the coordinate check.

    It cannot detect effects of weight decay, batch size, horizon or late training, nor a wrong
    schedule, which `parametrizing.guard` detects.

    Returns:
        {"verdict", "slopes": [`Slope` as a dict], "sizes": [{"activation", "step", "rms"}],
        "diagnosis", "caveats"}. The verdict is that of the worst slope at steps 4 and 10.
    """
    values = slope_fit.measure_sizes(
        grid, lambda *point: changes(target, grid.over, *point), "coordinate check"
    )
    sizes = [{"activation": name, "step": step, "rms": rms} for (name, step), rms in values.items()]
    slopes = [
        vars(_slope(name, step, slope_fit.slope(grid.sizes, rms)))
        for (name, step), rms in values.items()
    ]
    return {
        "verdict": slope_fit.worst([row["verdict"] for row in slopes]),
        "slopes": slopes,
        "sizes": sizes,
        "diagnosis": diagnose(slopes, grid.over, target.family),
        "caveats": _caveats(target),
    }


def _slope(activation: str, step: int, slope: float) -> Slope:
    return Slope(activation, step, slope, "-" if step == STEPS[0] else slope_fit.verdict(slope))
