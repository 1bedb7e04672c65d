"""A check's answer in lines for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]


def lines(found: Found) -> list[str]:
    """The verdict, what it rests on, what is likely wrong, what to know."""
    over = found["over"]
    points = ", ".join(map(str, found[f"{over}s"]))
    said = [f"{found['what']} check over {over}s {points}: {found['verdict'].upper()}"]
    said += {
        "coordinate": _coordinate,
        "sharpness": _sharpness,
        "alignment": _alignment,
        "regime": _regime,
    }[found["what"]](found)
    said += [f"  {found['finding']}"] if "finding" in found else []
    return (
        said
        + [f"  likely: {each}" for each in found.get("diagnosis", [])]
        + [f"  note: {each}" for each in found["caveats"]]
    )


def _coordinate(found: Found) -> list[str]:
    return [
        f"  {s['activation']:10} step {s['step']:<3} slope {s['slope']:+.2f}  {s['verdict']}"
        for s in found["slopes"]
    ]


def _sharpness(found: Found) -> list[str]:
    rows = []
    for row in found["steps"]:
        kind = "scaled" if row["scaled"] else "raw"
        values = " ".join(f"{value:9.4g}" for value in row[kind])
        rows.append(
            f"  step {row['step']:<3} {kind:6} {values}  slope {row['slope']:+.2f}  (raw {row['slope_raw']:+.2f})"
        )
    limit = found["threshold"]
    return rows + (
        [f"  the optimizer's limit of stability: {limit:.3g}, for the preconditioned sharpness"]
        if limit
        else []
    )


def _alignment(found: Found) -> list[str]:
    """Mean exponents of what has one, a line a step and term."""
    held: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in found["tensors"]:
        if row["fits"] != "-":
            held[row["step"], row["term"]].append(row["exponent"])
    return [
        f"  step {step:<3} {term:6} exponent {sum(each) / len(each):.2f}, mean of {len(each)} tensors ({min(each):.2f} to {max(each):.2f})"
        for (step, term), each in sorted(held.items())
    ]


def _regime(found: Found) -> list[str]:
    return [
        f"  {row['of']:8} step {row['step']:<3} {' '.join(f'{value:7.3g}' for value in row['relative'])}  slope {row['slope']:+.2f}"
        for row in found["changes"]
    ]
