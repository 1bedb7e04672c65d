"""Names the likely bug from the slopes of a failed coordinate check.

Each known bug has its own pattern of slopes; the patterns were measured with planted bugs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scaletune.checking.slope_fit import FAIL, PASS
from scaletune.rules.families import family_named

STEPS = (1, 4, 10)
"""Steps of the coordinate check. After the first, only the readout, which starts at zero, has
changed."""

BUGS = {
    "standard parametrization with one global lr": (
        "residual",
        4,
        "hidden matrices and the readout need lr / m; the form has one lr for all tensors, or a"
        " scheduler overwrote the lr of the param groups",
    ),
    "hidden lr not scaled": (
        "residual",
        4,
        "hidden matrices need lr / m; check that no scheduler overwrites the lr of the groups",
    ),
    "output multiplier missing": (
        "logits",
        1,
        "the logits change too much; multiply the readout by 1 / m, or divide its lr, as the form"
        " says",
    ),
    "readout lr divided by m twice": (
        "logits",
        1,
        "the multiplier of the logits, or the form, divides by m already; remove the second"
        " division",
    ),
    "embedding lr divided by m": (
        "embedding",
        4,
        "the embedding's fan-in does not grow with width; do not divide its lr by m",
    ),
    "eps large and unscaled": (
        "residual",
        4,
        "gradients shrink with width, but eps does not; scale eps as the form says, or lower it",
    ),
    "depth rule missing": (
        "residual",
        4,
        "the residual branches add up over depth; set `depth_alpha` to 0.5 or 1, and `base_depth`",
    ),
}
"""Name of each bug: (activation, step) where it shows, and what to change. m is the width divided
by the base width."""


def _matches(slopes: Mapping[tuple[str, int], float]) -> dict[str, bool]:
    """Whether the slopes over width match each bug.

    Of the bugs that affect the same tensors at most one matches.
    """
    first, second, _ = STEPS
    embedding, hidden = slopes["embedding", second], slopes["residual", second]
    readout = slopes["logits", first]
    up, down = (FAIL + PASS) / 2, -0.5  # a form with multipliers of m**1/2 shows half of a power
    growing, readout_grows = hidden > up, readout > up or embedding > up
    # only a large eps slows down more than one kind of tensor
    eps = hidden < -PASS and min(embedding, readout) < -0.75 * PASS
    return {
        "standard parametrization with one global lr": growing and readout_grows,
        "hidden lr not scaled": growing and not readout_grows,
        "output multiplier missing": readout > up and not growing,
        "readout lr divided by m twice": readout < down and not eps,
        "embedding lr divided by m": embedding < down and not eps,
        "eps large and unscaled": eps,
    }


def diagnose(
    slopes: Sequence[Mapping[str, Any]], over: str = "width", family: str = "adamw"
) -> list[str]:
    """Names the likely bugs.

    Args:
        slopes: Rows {"activation", "step", "slope", "verdict"} of a coordinate check.
        over: "width" or "depth".
        family: Optimizer family. An eps that is too large looks like a division of all learning
            rates by m; for a family without eps it is not reported.

    Returns:
        One sentence per bug, "NAME: what to change (evidence)". Empty if every judged slope passes;
        one sentence that says so if no known bug matches.
    """
    judged = [row for row in slopes if row["verdict"] not in ("-", "pass")]
    if not judged:
        return []
    values = {(row["activation"], row["step"]): row["slope"] for row in slopes}
    steepest = max(judged, key=lambda row: abs(row["slope"]))
    largest = _evidence(steepest["activation"], steepest["step"], steepest["slope"], over)
    if not all(map(math.isfinite, values.values())):
        return [
            "training diverged: an activation is not finite, so slopes cannot be compared; lower"
            f" `lr` ({largest})"
        ]
    if over == "width":
        matches = _matches(values)
    else:
        matches = {"depth rule missing": values["residual", STEPS[1]] > FAIL}
    if family_named(family).eps == 0:
        matches["eps large and unscaled"] = False
    sentences = [
        f"{bug}: {change} ({_evidence(where, step, values[where, step], over)})"
        for bug, (where, step, change) in BUGS.items()
        if matches.get(bug)
    ]
    return sentences or [f"no known bug matches these slopes ({largest})"]


def _evidence(activation: str, step: int, slope: float, over: str) -> str:
    return f"{activation} at step {step}: slope {slope:+.2f} over {over}"
