"""A known bug leaves its own slopes in a coordinate check, and is named by them: signatures measured on planted bugs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scaletune.checking.slope_fit import FAIL, PASS
from scaletune.rules.families import family_named

STEPS = (1, 4, 10)  # of the coordinate check; the first is where a zeroed readout alone has moved
BUGS = {  # its name: where it shows, at which step, and why; m is the width over the base model's
    "standard parametrization with one global lr": (
        "residual",
        4,
        "hidden and readout need lr / m, or a scheduler overwrote theirs",
    ),
    "hidden lr not scaled": (
        "residual",
        4,
        "hidden tensors need lr / m, or a scheduler overwrote the groups' lr",
    ),
    "output multiplier missing": (
        "logits",
        1,
        "the readout moves too far: its multiplier, or the division of its lr, is not there",
    ),
    "readout lr divided by m twice": (
        "logits",
        1,
        "the multiplier of the logits, or the form, has divided by m already",
    ),
    "embedding lr divided by m": (
        "embedding",
        4,
        "the embedding's fan-in does not grow, and its lr must not shrink",
    ),
    "eps large and unscaled": (
        "residual",
        4,
        "gradients shrink with width under an eps that does not: scale it, or lower it",
    ),
    "depth rule missing": (
        "residual",
        4,
        "branches add up over depth: set `depth_alpha` to 1/2 or 1, and `base_depth`",
    ),
}


def _fits(found: Mapping[tuple[str, int], float]) -> dict[str, bool]:
    """Bug -> whether its signature over width is there; at most one of those that touch the same tensors."""
    first, second, _ = STEPS
    embedding, hidden, readout = (
        found["embedding", second],
        found["residual", second],
        found["logits", first],
    )
    up, down = (FAIL + PASS) / 2, -0.5  # a form with multipliers of m**1/2 shows half of a power
    growing, head = hidden > up, readout > up or embedding > up
    eps = (
        hidden < -PASS and min(embedding, readout) < -0.75 * PASS
    )  # it alone slows down more than one kind of tensor
    return {
        "standard parametrization with one global lr": growing and head,
        "hidden lr not scaled": growing and not head,
        "output multiplier missing": readout > up and not growing,
        "readout lr divided by m twice": readout < down and not eps,
        "embedding lr divided by m": embedding < down and not eps,
        "eps large and unscaled": eps,
    }


def diagnose(
    slopes: Sequence[Mapping[str, Any]], over: str = "width", family: str = "adamw"
) -> list[str]:
    """One sentence for each of BUGS whose signature the table of slopes bears; none when every judged slope passes.

    A table that fails like no known bug gets one sentence that says so. A division of all learning rates by m looks like eps,
    which an optimizer family without one is not told of.
    """
    judged = [row for row in slopes if row["verdict"] not in ("-", "pass")]
    if not judged:
        return []
    found = {(row["activation"], row["step"]): row["slope"] for row in slopes}
    steepest = max(judged, key=lambda row: abs(row["slope"]))
    shown = f"{steepest['activation']} at step {steepest['step']}: slope {steepest['slope']:+.2f} over {over}"
    if not all(map(math.isfinite, found.values())):
        return [
            f"an activation is no longer finite, which says nothing of the exponents: lower `lr` ({shown})"
        ]
    fits = (
        _fits(found)
        if over == "width"
        else {"depth rule missing": found["residual", STEPS[1]] > FAIL}
    )
    fits["eps large and unscaled"] = (
        fits.get("eps large and unscaled", False) and family_named(family).eps != 0
    )
    named = [(bug, *BUGS[bug]) for bug in BUGS if fits.get(bug)]
    sentences = [
        f"{bug}: {why} ({at} at step {step}: slope {found[at, step]:+.2f} over {over})"
        for bug, at, step, why in named
    ]
    return sentences or [f"no known bug fits ({shown})"]
