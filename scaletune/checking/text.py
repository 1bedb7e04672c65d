"""The result of a check as text: what was observed, what it means, and what to change."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from scaletune.checking.slope_fit import FAIL, PASS

Result = Mapping[str, Any]


def lines(result: Result) -> list[str]:
    """The verdict, the observations, their meaning, what to change, and the caveats."""
    what, over = result["what"], result["over"]
    sizes = ", ".join(map(str, result[f"{over}s"]))
    observed = {
        "coordinate": _coordinate_rows,
        "sharpness": _sharpness_rows,
        "alignment": _alignment_rows,
        "regime": _regime_rows,
    }[what](result)
    meaning = {
        "coordinate": _coordinate_meaning,
        "sharpness": _sharpness_meaning,
        "alignment": _alignment_meaning,
        "regime": _regime_meaning,
    }[what](result)
    return [
        f"{what} check over {over}s {sizes}: {result['verdict'].upper()}",
        f"  observed: {_quantity(result)}",
        *(f"    {row}" for row in observed),
        f"  meaning: {meaning}",
        *(f"  to change: {change}" for change in _changes(result)),
        *(f"  note: {caveat}" for caveat in result["caveats"]),
    ]


def _quantity(result: Result) -> str:
    """What was measured, in one line."""
    what, over = result["what"], result["over"]
    limits = f"|slope| up to {PASS:g} passes, above {FAIL:g} fails"
    if what == "coordinate":
        return f"RMS change of each activation ~ {over}**slope ({limits})"
    if what == "sharpness":
        return f"top eigenvalue of the Hessian at each {over}, ~ {over}**slope ({limits})"
    return str(result["finding"])


def _changes(result: Result) -> list[str]:
    """What to change: one sentence each; none if the check passes."""
    what, verdict = result["what"], result["verdict"]
    if what == "coordinate":
        return list(result["diagnosis"])
    return [CHANGES[what, verdict]] if (what, verdict) in CHANGES else []


PER_TENSOR = (
    "use a form with one learning rate per tensor (mup); if this is one, the coordinate check"
    " names the likely bug"
)
CHANGES = {
    ("sharpness", "warn"): "repeat with more seeds and a wider range of sizes",
    ("sharpness", "fail"): PER_TENSOR,
    ("alignment", "none"): "alignment='none' of st.parametrize allows larger learning rates",
    ("alignment", "neither"): "repeat with more seeds and a wider range of widths",
    ("alignment", "-"): "use a larger lr if nothing changed, a smaller one if training diverged",
    ("regime", "kernel regime"): PER_TENSOR,
    ("regime", "between"): "repeat with more seeds and a wider range of sizes",
    ("regime", "unstable"): PER_TENSOR,
}


# --- coordinate check -----------------------------------------------------------------------------


def _coordinate_rows(result: Result) -> list[str]:
    return [
        f"{row['activation']:10} step {row['step']:<3} slope {row['slope']:+.2f}  "
        + ("not judged" if row["verdict"] == "-" else row["verdict"])
        for row in result["slopes"]
    ]


def _coordinate_meaning(result: Result) -> str:
    over = result["over"]
    if result["verdict"] == "pass":
        return (
            f"activations change by the same amount at every {over}, so a learning rate tuned at"
            f" one {over} suits the others"
        )
    judged = [row for row in result["slopes"] if row["verdict"] != "-"]
    worst = max(judged, key=lambda row: abs(row["slope"]))
    if not math.isfinite(worst["slope"]):
        return f"training diverged: an activation is not finite ({worst['activation']})"
    effect = "more" if worst["slope"] > 0 else "less"
    transfer = "does not suit" if result["verdict"] == "fail" else "may not suit"
    return (
        f"the larger the {over}, the {effect} an activation changes ({worst['activation']}, slope"
        f" {worst['slope']:+.2f} at step {worst['step']}), so a learning rate tuned at one {over}"
        f" {transfer} the others"
    )


# --- sharpness ------------------------------------------------------------------------------------


def _sharpness_rows(result: Result) -> list[str]:
    rows = []
    for row in result["steps"]:
        kind = "scaled" if row["scaled"] else "raw"
        values = " ".join(f"{value:9.4g}" for value in row[kind])
        rows.append(
            f"step {row['step']:<3} {kind:6} {values}  slope {row['slope']:+.2f}"
            f"  (raw {row['slope_raw']:+.2f})"
        )
    if limit := result["threshold"]:
        rows.append(f"stability threshold of the preconditioned sharpness: {limit:.3g}")
    return rows


def _sharpness_meaning(result: Result) -> str:
    over = result["over"]
    meaning = {
        "pass": f"the largest stable learning rate is about the same at every {over}",
        "warn": f"the largest stable learning rate may depend on {over}",
        "fail": f"the largest stable learning rate depends on {over}",
    }[result["verdict"]]
    return f"{result['finding']}; {meaning}"


# --- alignment ------------------------------------------------------------------------------------


def _alignment_rows(result: Result) -> list[str]:
    """The mean exponent over tensors for each step and product."""
    exponents: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in result["tensors"]:
        if row["fits"] != "-":
            exponents[row["step"], row["term"]].append(row["exponent"])
    header = "products of weights W and inputs x; 0: at initialisation, d: the change since then"
    return [header] + [
        f"step {step:<3} {term:6} exponent {sum(each) / len(each):.2f}, mean of {len(each)} tensors"
        f" ({min(each):.2f} to {max(each):.2f})"
        for (step, term), each in sorted(exponents.items())
    ]


def _alignment_meaning(result: Result) -> str:
    return {
        "full": "weight updates are aligned with their inputs, as alignment='full' (the default)"
        " assumes",
        "none": "weight updates are not aligned with their inputs, as alignment='none' assumes",
        "between": "weight updates are partly aligned with their inputs; the learning rates of"
        " alignment='full' (the default) are on the safe side",
        "neither": "the exponent is outside the range from 0.5 to 1 that theory expects",
        "-": "alignment is not known",
    }[result["verdict"]]


# --- regime ---------------------------------------------------------------------------------------


def _regime_rows(result: Result) -> list[str]:
    return [
        f"{row['of']:8} step {row['step']:<3}"
        f" {' '.join(f'{value:7.3g}' for value in row['relative'])}  slope {row['slope']:+.2f}"
        for row in result["changes"]
    ]


def _regime_meaning(result: Result) -> str:
    over = result["over"]
    return {
        "feature learning": f"the model learns features at every {over}",
        "kernel regime": f"the larger the {over}, the less the features change: the model trains"
        " like a fixed kernel",
        "between": f"the larger the {over}, the less the features change, but more slowly than in"
        " the kernel regime",
        "unstable": f"the larger the {over}, the more the features change: at a larger {over} this"
        " learning rate is too high",
    }[result["verdict"]]
