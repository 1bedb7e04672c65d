"""The coordinate check: how far activations move in a few steps, against width or depth.

With the right exponents the root-mean-square change of every activation is independent of width (arXiv:2203.03466, App. D.1),
and of depth with a depth rule (arXiv:2310.02244, arXiv:2505.01618). A zero-init readout keeps the slowly dying random logits of
the first steps out of the picture, and tensors that do not grow at all, such as a readout's bias, are held still: what they add to the
logits is the same at every width, and hides what the readout does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scaletune.checking import slope_fit
from scaletune.checking.bug_signatures import STEPS, diagnose
from scaletune.checking.hooks import activations, hold, look, normalise, zero_head
from scaletune.checking.slope_fit import Asked
from scaletune.checking.target import Run, Subject, trained
from scaletune.errors import UserError
from scaletune.rules.families import family_named
from scaletune.rules.forms import form_named


@dataclass(frozen=True)
class Slope:
    """d ln RMS(h_t - h_0) / d ln width (or depth) for one activation at one step, over seeds."""

    activation: str  # "embedding" | "residual" | "final" | "logits"
    step: int
    slope: float
    verdict: str  # "pass" | "warn" | "fail"; step 1 is not judged: "-"


def _seen(subject: Subject, run: Run, batch: Any, over: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            name: value.detach().clone()
            for name, value in activations(look(subject, run, batch), over).items()
        }


def _caveats(subject: Subject) -> list[str]:
    """SGD's step is as large as its gradient, which a readout of zeros makes smaller than a random one of std ~ width**-1/2 does."""
    if family_named(subject.family).gradient == 0 or form_named(subject.form).backward >= 1:
        return subject.caveats
    return [
        *subject.caveats,
        f"{subject.family!r} in this form has lr for the gradients of a random readout: under the check's readout of zeros all else moves ~ width**-1/2",
    ]


def changes(
    subject: Subject, over: str, width: int, depth: int, seed: int
) -> dict[tuple[str, int], float]:
    """(activation, step) -> RMS over coordinates of its change since initialisation, on one batch trained on for max(STEPS) steps."""
    run, batch = subject.start(width, depth, seed), subject.batch(seed)
    zero_head(subject, run, batch)
    hold(run, "fin")
    if over == "depth":
        normalise(subject, run, batch)
    start = _seen(subject, run, batch, over)
    if missing := {"embedding", "residual"} - start.keys():
        raise UserError(
            f"a coordinate check needs tensors of roles `emb` and `hid`, but nothing is the model's {min(missing)}"
        )
    found: dict[tuple[str, int], float] = {}
    for step in trained(subject, run, batch, STEPS):
        now = _seen(subject, run, batch, over)
        found |= {
            (name, step): float((now[name] - start[name]).square().mean().sqrt()) for name in now
        }
    return found


def check(subject: Subject, asked: Asked) -> dict[str, Any]:
    """{"verdict", "over", "widths", "depths", "slopes": [Slope as a dict], "sizes", "diagnosis", "caveats"}; the verdict is the worst
    slope's at steps 4 and 10. It cannot see weight decay, batch, horizon or late-training effects, nor a schedule's: `guard` can.
    """
    sizes = slope_fit.over_seeds(
        asked, lambda *point: changes(subject, asked.over, *point), "coordinate check"
    )
    table = [
        {"activation": name, "step": step, "rms": size} for (name, step), size in sizes.items()
    ]
    slopes = [
        vars(_judged(name, step, slope_fit.slope(asked.sizes, size)))
        for (name, step), size in sizes.items()
    ]
    return {
        "verdict": slope_fit.worst([row["verdict"] for row in slopes]), "slopes": slopes, "sizes": table,
        "diagnosis": diagnose(slopes, asked.over, subject.family), "caveats": _caveats(subject),
    }  # fmt: skip


def _judged(activation: str, step: int, slope: float) -> Slope:
    return Slope(activation, step, slope, "-" if step == STEPS[0] else slope_fit.verdict(slope))
