"""Asking a published law at a scale of the contract's columns, and what must be said beside its answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from scaletune.laws.entry import Law, positive

SLACK = 1.01  # ranges are published rounded: 214.7e6 for a model of 214663680
NEAR = 1.1  # "about half a million tokens" is 0.5e6 to one and 524288 to another


def consult(
    law: Law, *, n_params: float, tokens: float, batch_tokens: float | None = None, flops: float | None = None
) -> tuple[dict[str, float | None], list[str]]:
    """What the law gives, None where that is not positive, and the warnings. `n_params` is non-embedding; `flops` as the law counts them."""
    given = {"n_params": n_params, "tokens": tokens, "batch_tokens": batch_tokens, "flops": flops}
    asked = {name: positive(name, value) for name, value in given.items() if value is not None}
    derived = {"flops": 6 * asked["n_params"] * asked["tokens"], "tokens_per_param": asked["tokens"] / asked["n_params"]}
    scale = derived | asked
    raw = law(**{entry.symbol: scale[entry.column] for entry in law.inputs})
    values = {name: value if value > 0 and math.isfinite(value) else None for name, value in raw.items()}
    warnings = [
        f"{name} would be {raw[name]:.3g}, not a positive number: the law has none here" for name, value in values.items() if value is None
    ]
    warnings += [*_units(law, asked, scale), *_ranges(law, scale | values), *_held(law, scale), *_batch(law, scale, values)]
    return values, [*warnings, *law.cautions, *(f"unconfirmed, from memory: {part}" for part in law.unconfirmed)]


def _units(law: Law, asked: Mapping[str, float], scale: Mapping[str, float]) -> Iterator[str]:
    """Inputs that the source counts in another way than the column they came from."""
    for entry in law.inputs:
        if entry.column != "flops" and entry.mismatch:
            yield entry.mismatch
        elif entry.column == "flops" and "flops" not in asked:
            used = f"flops were not given, so 6 * n_params * tokens = {scale['flops']:.3g} was used"
            yield f"{used}: {entry.mismatch}" if entry.mismatch else used


def _ranges(law: Law, quantities: Mapping[str, float | None]) -> Iterator[str]:
    """Quantities, asked or answered, outside of the runs behind the law."""
    for name, (low, high) in law.fitted.items():
        value = quantities.get(name)
        if value is None or low / SLACK <= value <= high * SLACK:
            continue
        side, factor = ("above", value / high) if value > high else ("below", low / value)
        times = f"{factor:.3g}" if factor < 1000 else f"{factor:,.0f}"
        span = f"{low:.3g} to {high:.3g}" if low else f"up to {high:.3g}"
        checked = f", checked by its authors up to {law.validated[name]:.3g}" if side == "above" and name in law.validated else ""
        yield f"{name} {value:.3g} is {times}x {side} the law's range ({span}{checked})"


def _held(law: Law, scale: Mapping[str, float]) -> Iterator[str]:
    """Quantities that had one value in all runs behind the law, and another here, or none."""
    for name, held in law.held.items():
        if name not in scale:
            yield f"its lr holds at {name} {held:.3g}, the same in all its runs: train with that"
        elif not held / NEAR <= scale[name] <= held * NEAR:
            yield f"{name} {scale[name]:.3g} is {scale[name] / held:.3g}x the {held:.3g} of all its runs: the law does not know that direction"


def _batch(law: Law, scale: Mapping[str, float], values: Mapping[str, float | None]) -> Iterator[str]:
    """A batch the user gave, beside one that the law chose: mixing them is the commonest misuse of these laws."""
    own, given = values.get("batch_tokens"), scale.get("batch_tokens")
    if own is None or given is None:
        return
    yield f"the given batch_tokens {given:.3g} is not used: the law chooses its own, {own:.3g}"
    if "lr" in values:
        yield f"its lr was fitted together with its batch_tokens {own:.3g} and must not be paired with another"
