"""Asking published laws at what is known of a run, and what must be said beside the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scaletune.errors import UserError
from scaletune.laws.columns import COLUMNS, SIGNED, asked, option
from scaletune.laws.entry import Input, Law

SEQUENCE = 1024  # tokens: a batch of fewer is most often a count of sequences
SLACK = 1.01  # ranges are published rounded: 214.7e6 for a model of 214663680
NEAR = 1.1  # "about half a million tokens" is 0.5e6 to one and 524288 to another
COUNTS = (
    "n_active",
    "n_params",
    "n_active_total",
    "n_params_with_head",
    "n_params_total",
)  # nearest first to the N of 6ND


def consult(law: Law, **given: Any) -> tuple[dict[str, float | None], list[str]]:
    """What the law gives, None where that is not positive, and the warnings. `given`: columns and, where the law has none, coefficients."""
    known = asked(
        {name: value for name, value in given.items() if value is not None}, tuple(law.unknown)
    )
    scale = _derived(known) | known
    found = {entry.symbol: _value(law, entry, scale) for entry in law.inputs}
    raw = law(**found, **{name: given[name] for name in law.unknown if given.get(name) is not None})
    values = {
        name: value if math.isfinite(value) and (value > 0 or name in SIGNED) else None
        for name, value in raw.items()
    }
    scale |= {entry.column: found[entry.symbol] for entry in law.inputs}
    warnings = [
        f"{name} would be {raw[name]:.3g}, not a positive number: the law has none here"
        for name, value in values.items()
        if value is None
    ]
    warnings += [
        *_units(law, known, scale),
        *_ranges(law, scale | values),
        *_held(law, scale),
        *_batch(law, scale, values),
    ]
    warnings += _unused(law, known, scale)
    return values, [
        *warnings,
        *law.cautions,
        *(f"unconfirmed, from memory: {part}" for part in law.unconfirmed),
    ]


def answers(law: Law, **given: Any) -> bool:
    """Whether this is enough to ask the law."""
    known = {name: value for name, value in given.items() if value is not None}
    scale = (
        _derived(asked({name: value for name, value in known.items() if name in COLUMNS})) | known
    )
    return all(_from(entry, scale) or entry.default is not None for entry in law.inputs) and set(
        law.unknown
    ) <= set(known)


RATIOS = {
    "steps": ("tokens", "batch_tokens"),
    "epochs": ("tokens", "unique_tokens"),
    "batch_ratio": ("batch_tokens", "base_batch_tokens"),
}


def _derived(known: Mapping[str, Any]) -> dict[str, float]:
    """What follows from the given: 6ND, tokens per parameter, and what ranges are said of."""
    derived = {
        name: known[over] / known[under]
        for name, (over, under) in RATIOS.items()
        if over in known and under in known
    }
    count = next((known[name] for name in COUNTS if name in known), None)
    if count and "tokens" in known:
        derived |= {
            "flops": 6 * count * known["tokens"],
            "tokens_per_param": known["tokens"] / count,
        }
    if "lr_schedule" in known:
        derived["peak_lr"] = max(known["lr_schedule"])
    return derived


def _from(entry: Input, scale: Mapping[str, Any]) -> str:
    """The column that an input is read from, empty when it is not known. Of a mixture of experts n_params is not what is active."""
    mixed = entry.column in ("n_active", "n_active_total") and scale.get("n_experts", 1) > 1
    return next(
        (
            name
            for name in (entry.column, *entry.instead)
            if name in scale and not (mixed and name == "n_params")
        ),
        "",
    )


def _value(law: Law, entry: Input, scale: Mapping[str, Any]) -> Any:
    """The value of one input; UserError naming the option that would give it."""
    if name := _from(entry, scale):
        return scale[name]
    if entry.default is not None:
        return entry.default
    other = next((name for name in COUNTS if name in scale), "") if entry.column in COUNTS else ""
    need = f"{law.id} needs {entry.column} ({entry.means}): give {option(entry.column)}"
    if not other:
        raise UserError(need)
    related = (
        " (pearce_embed relates the two)"
        if {entry.column, other} == {"n_params", "n_params_total"}
        else ""
    )
    raise UserError(f"{need}; {other} counts other parameters and is not taken for it{related}")


def _units(law: Law, known: Mapping[str, Any], scale: Mapping[str, Any]) -> Iterator[str]:
    """Inputs that the source counts in another way than the column they came from."""
    for entry in law.inputs:
        name = _from(entry, known)
        if entry.doubt:
            yield entry.doubt
        if name == entry.column:
            continue
        if name:
            yield entry.mismatch or f"{name} is taken for its {entry.column}"
        elif entry.column in ("flops", "steps"):
            count = next((name for name in COUNTS if name in known), "")
            rule = f"6 * {count} * tokens" if entry.column == "flops" else "tokens / batch_tokens"
            used = f"{entry.column} were not given, so {rule} = {scale[entry.column]:.3g} was used"
            yield f"{used}: {entry.mismatch}" if entry.mismatch else used
        else:
            yield f"{entry.column} was not given: {scale[entry.column]:g} is taken ({entry.means})"


def _ranges(law: Law, quantities: Mapping[str, float | None]) -> Iterator[str]:
    """Quantities, asked or answered, outside of the runs behind the law."""
    for name, (low, high) in law.fitted.items():
        value = quantities.get(name)
        if value is None or low / SLACK <= value <= high * SLACK:
            continue
        side, factor = (
            ("above", value / high)
            if value > high
            else ("below", low / value if value else math.inf)
        )
        times = f"{factor:.3g}" if factor < 1000 else f"{factor:,.0f}"
        span = f"{low:.3g} to {high:.3g}" if low else f"up to {high:.3g}"
        checked = (
            f", checked by its authors up to {law.validated[name]:.3g}"
            if side == "above" and name in law.validated
            else ""
        )
        yield f"{name} {value:.3g} is {times}x {side} the law's range ({span}{checked})"


def _held(law: Law, scale: Mapping[str, float]) -> Iterator[str]:
    """Quantities that had one value in all runs behind the law, and another here, or none."""
    for name, held in law.held.items():
        if name not in scale:
            yield f"its {law.gives[0]} holds at {name} {held:.3g}, the same in all its runs: train with that"
        elif not held / NEAR <= scale[name] <= held * NEAR:
            yield f"{name} {scale[name]:.3g} is {scale[name] / held:.3g}x the {held:.3g} of all its runs: the law does not know that direction"


def _batch(
    law: Law, scale: Mapping[str, float], values: Mapping[str, float | None]
) -> Iterator[str]:
    """A batch the user gave, beside one that the law chose: mixing them is the commonest misuse of these laws."""
    own, given = values.get("batch_tokens"), scale.get("batch_tokens")
    if given is not None and given < SEQUENCE:
        yield f"batch_tokens {given:g} is less than one sequence of most runs: if it counts sequences, multiply it by their length"
    if own is None or given is None:
        return
    yield f"the given batch_tokens {given:.3g} is not used: the law chooses its own, {own:.3g}"
    if "lr" in values:
        yield f"its lr was fitted together with its batch_tokens {own:.3g} and must not be paired with another"


ALTERING = (
    "n_experts",
    "granularity",
    "sparsity",
    "streams",
    "bits_weights",
    "bits_activations",
    "bits_kv",
    "unique_tokens",
)


def _unused(law: Law, known: Mapping[str, Any], scale: Mapping[str, float]) -> Iterator[str]:
    """What makes another model or other data of it, given to a law that knows nothing of that."""
    read = {entry.column for entry in law.inputs}
    for name in ALTERING:
        if (
            name in known
            and name not in read
            and not (name == "unique_tokens" and scale.get("epochs", 1) <= SLACK)
        ):
            epochs = (
                f", and takes the {scale['epochs']:.3g} epochs as one"
                if name == "unique_tokens" and "epochs" in scale
                else ""
            )
            yield f"{name} {known[name]:.3g} is not used: the law knows nothing of it{epochs}"


def batch_of(law: Law, values: Mapping[str, float | None]) -> str:
    """Which batch the lr of this law belongs to, in words; empty for a law without an lr."""
    if "lr" not in law.gives:
        return ""
    own = values.get("batch_tokens")
    if own is not None:
        return f"with batch_tokens {own:.4g}, its own"
    if "batch_tokens" in law.held:
        return f"with batch_tokens {law.held['batch_tokens']:.4g}, that of its runs"
    read = {entry.column for entry in law.inputs}
    if "batch_tokens" in read:
        return "with the batch given"
    return (
        "with the batch of the tuned run" if "base_lr" in read else "with the batch of its own runs"
    )


def pairing(law: Law, others: Sequence[Law]) -> list[str]:
    """What is said beside a law that gives only one of lr and batch, where another of the comparison gives the other."""
    half = {"lr", "batch_tokens"} & set(law.gives)
    if len(half) != 1 or any(
        entry.column == "batch_tokens" for entry in law.inputs
    ):  # its lr is a function of the batch
        return []
    has = half.pop()
    lacks = "batch_tokens" if has == "lr" else "lr"
    giving = [other.id for other in others if other.id != law.id and lacks in other.gives]
    whose = ", ".join(giving) if len(giving) < 3 else f"the {len(giving)} laws here that give one"
    return (
        [
            f"it gives no {lacks}: do not pair its {has} with the {lacks} of {whose}, fitted apart from it"
        ]
        if giving
        else []
    )
