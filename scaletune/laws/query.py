"""Evaluates published laws at a user's inputs and collects the warnings of the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scaletune.errors import UserError
from scaletune.laws.columns import COLUMNS, SIGNED, check_given, option
from scaletune.laws.entry import Input, Law
from scaletune.units import human

SEQUENCE = 1024  # tokens: a smaller batch_tokens is most often a count of sequences
SLACK = 1.01  # ranges are published rounded: 214.7e6 for a model of 214663680
NEAR = 1.1  # "half a million tokens" is 0.5e6 in one paper and 524288 in another
COUNTS = (  # the best match to the N of 6ND first
    "n_active",
    "n_params",
    "n_active_total",
    "n_params_with_head",
    "n_params_total",
)


def evaluate(law: Law, **given: Any) -> tuple[dict[str, float | None], list[str]]:
    """Evaluates a law at inputs given by column name.

    Args:
        law: An entry of `laws.CATALOGUE`.
        **given: Values by the names of `laws.COLUMNS`, in their units; coefficients that the law
            leaves open by their names in `law.unknown`. None means not given.

    Returns:
        {quantity: value} (None where the formula gives no positive number) and the warnings.

    Raises:
        UserError: An input is missing, unknown or outside its domain.

    Example:
        >>> from scaletune import laws
        >>> values, warnings = laws.evaluate(laws.law("kaplan_lr"), n_params=1e8)
        >>> round(values["lr"], 6), len(warnings)
        (0.000669, 1)
    """
    known = check_given(
        {name: value for name, value in given.items() if value is not None}, tuple(law.unknown)
    )
    scale = _derive(known) | known
    inputs = {entry.symbol: _input_value(law, entry, scale) for entry in law.inputs}
    own = {name: given[name] for name in law.unknown if given.get(name) is not None}
    outputs = law(**inputs, **own)
    values = {
        name: value if math.isfinite(value) and (value > 0 or name in SIGNED) else None
        for name, value in outputs.items()
    }
    scale |= {entry.column: inputs[entry.symbol] for entry in law.inputs}
    warnings = [
        f"the formula gives {name} = {outputs[name]:.3g}, which is not a positive number: "
        f"the law has no {name} here"
        for name, value in values.items()
        if value is None
    ]
    warnings += [
        *_count_warnings(law, known, scale),
        *_range_warnings(law, scale | values),
        *_held_warnings(law, scale),
        *_batch_warnings(law, scale, values),
        *_unused_warnings(law, known, scale),
    ]
    unconfirmed = [f"unconfirmed, not checked in the source: {part}" for part in law.unconfirmed]
    return values, [*warnings, *law.warnings, *unconfirmed]


def can_evaluate(law: Law, **given: Any) -> bool:
    """Whether these inputs are enough to evaluate the law."""
    known = {name: value for name, value in given.items() if value is not None}
    columns = check_given({name: value for name, value in known.items() if name in COLUMNS})
    scale = _derive(columns) | known
    has_inputs = all(
        _source_column(entry, scale) or entry.default is not None for entry in law.inputs
    )
    return has_inputs and set(law.unknown) <= set(known)


RATIOS = {
    "steps": ("tokens", "batch_tokens"),
    "epochs": ("tokens", "unique_tokens"),
    "batch_ratio": ("batch_tokens", "base_batch_tokens"),
}


def _derive(known: Mapping[str, Any]) -> dict[str, float]:
    """Quantities that follow from the inputs: 6ND, tokens per parameter, epochs and the like."""
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


def _source_column(entry: Input, scale: Mapping[str, Any]) -> str:
    """The column that an input is read from; empty if none is known.

    For a mixture of experts, n_params does not replace the active parameters.
    """
    mixture = entry.column in ("n_active", "n_active_total") and scale.get("n_experts", 1) > 1
    return next(
        (
            name
            for name in (entry.column, *entry.instead)
            if name in scale and not (mixture and name == "n_params")
        ),
        "",
    )


def _input_value(law: Law, entry: Input, scale: Mapping[str, Any]) -> Any:
    """The value of one input; UserError with the option that gives it."""
    if name := _source_column(entry, scale):
        return scale[name]
    if entry.default is not None:
        return entry.default
    other = next((name for name in COUNTS if name in scale), "") if entry.column in COUNTS else ""
    needed = f"{law.id} needs {entry.column} ({entry.means}): give {option(entry.column)}"
    if not other:
        raise UserError(needed)
    related = (
        " (the law pearce_embed converts between the two)"
        if {entry.column, other} == {"n_params", "n_params_total"}
        else ""
    )
    raise UserError(f"{needed}; {other} counts other parameters and does not replace it{related}")


def _show(value: float) -> str:
    """A number for a warning: `7.0B` for large counts, else three or four digits."""
    if 1e4 <= value < 1e15:
        return human(value)
    return f"{value:.4g}" if 1e3 <= value < 1e4 else f"{value:.3g}"


def _count_warnings(law: Law, known: Mapping[str, Any], scale: Mapping[str, Any]) -> Iterator[str]:
    """Inputs that the source counts differently, and inputs that were derived or set by default."""
    for entry in law.inputs:
        name = _source_column(entry, known)
        if entry.doubt:
            yield entry.doubt
        if name == entry.column:
            continue
        if name:
            yield entry.mismatch or f"{name} is used for {entry.column}"
        elif entry.column in ("flops", "steps"):
            count = next((name for name in COUNTS if name in known), "")
            rule = f"6 * {count} * tokens" if entry.column == "flops" else "tokens / batch_tokens"
            used = f"{entry.column} not given: {rule} = {scale[entry.column]:.3g} is used"
            yield f"{used}; {entry.mismatch}" if entry.mismatch else used
        else:
            yield f"{entry.column} not given: {scale[entry.column]:g} is used ({entry.means})"


def _range_warnings(law: Law, quantities: Mapping[str, float | None]) -> Iterator[str]:
    """Inputs and outputs outside the range of the runs behind the law."""
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
        span = f"{_show(low)} to {_show(high)}" if low else f"up to {_show(high)}"
        validated = (
            f", validated by its authors up to {_show(law.validated[name])}"
            if side == "above" and name in law.validated
            else ""
        )
        yield f"{name} {_show(value)} is {times}x {side} the fitted range ({span}{validated})"


def _held_warnings(law: Law, scale: Mapping[str, float]) -> Iterator[str]:
    """Quantities that had one value in all runs of the law and differ here or are not given."""
    for name, held in law.held.items():
        if name not in scale:
            yield (
                f"{law.gives[0]} is valid at {name} {_show(held)}, the value in all runs of this "
                "law: train with that value"
            )
        elif not held / NEAR <= scale[name] <= held * NEAR:
            yield (
                f"{name} {_show(scale[name])} is {scale[name] / held:.3g}x the {_show(held)} of "
                "all runs of this law: the law does not describe its effect"
            )


def _batch_warnings(
    law: Law, scale: Mapping[str, float], values: Mapping[str, float | None]
) -> Iterator[str]:
    """A given batch size next to one that the law predicts: combining them is a common mistake."""
    own, given = values.get("batch_tokens"), scale.get("batch_tokens")
    if given is not None and given < SEQUENCE:
        yield (
            f"batch_tokens {given:g} is less than one sequence of most runs: if it counts "
            "sequences, multiply it by the sequence length"
        )
    if own is None or given is None:
        return
    yield f"the given batch_tokens {_show(given)} is not used: the law predicts {_show(own)}"
    if "lr" in values:
        yield (
            f"lr was fitted together with the predicted batch_tokens {_show(own)}: "
            "do not combine it with another batch size"
        )


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


def _unused_warnings(
    law: Law, known: Mapping[str, Any], scale: Mapping[str, float]
) -> Iterator[str]:
    """Given properties of the model or data that the law has no input for."""
    columns = {entry.column for entry in law.inputs}
    for name in ALTERING:
        one_epoch = name == "unique_tokens" and scale.get("epochs", 1) <= SLACK
        if name not in known or name in columns or one_epoch:
            continue
        epochs = (
            f" and treats the {scale['epochs']:.3g} epochs as new data"
            if name == "unique_tokens" and "epochs" in scale
            else ""
        )
        yield f"{name} {_show(known[name])} is not used: the law has no such input{epochs}"


def batch_of(law: Law, values: Mapping[str, float | None]) -> str:
    """The batch size that the lr of this law belongs to, in words; empty for a law without lr."""
    if "lr" not in law.gives:
        return ""
    own = values.get("batch_tokens")
    if own is not None:
        return f"at the predicted batch size, {_show(own)} tokens"
    if "batch_tokens" in law.held:
        return f"at the batch size of its runs, {_show(law.held['batch_tokens'])} tokens"
    columns = {entry.column for entry in law.inputs}
    if "batch_tokens" in columns:
        return "at the given batch size"
    if "base_lr" in columns:
        return "at the batch size of the tuned run"
    return "at the batch size of its runs"


def pairing_warnings(law: Law, others: Sequence[Law]) -> list[str]:
    """A warning if this law gives only one of lr and batch size and another law gives the other."""
    given = {"lr", "batch_tokens"} & set(law.gives)
    is_function_of_batch = any(entry.column == "batch_tokens" for entry in law.inputs)
    if len(given) != 1 or is_function_of_batch:
        return []
    has = given.pop()
    lacks = "batch_tokens" if has == "lr" else "lr"
    giving = [other.id for other in others if other.id != law.id and lacks in other.gives]
    whose = ", ".join(giving) if len(giving) < 3 else f"the {len(giving)} laws here that give it"
    if not giving:
        return []
    return [
        f"this law gives no {lacks}: do not combine its {has} with the {lacks} of {whose}; "
        "the laws were fitted separately"
    ]
