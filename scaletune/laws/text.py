"""Laws as text: one law in full, or many laws as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from scaletune.laws.allocation_loss import frontier
from scaletune.laws.columns import QUANTITIES, option
from scaletune.laws.entry import Input, Law
from scaletune.laws.loss import chinchilla

WIDTH, INDENT, CELL = 100, 20, 38
LISTS = ("caveats", "not confirmed")  # headings whose lines are shown as a list
BUDGET = 5.88e23  # FLOPs of Chinchilla, at which laws of its form are compared
MARKS = {
    "*": "a coefficient is not confirmed",
    "?": "a coefficient is not published: give your own, see `scaletune laws ID`",
}


def sections(law: Law) -> dict[str, list[str]]:
    """Returns a law as plain strings under headings, for the terminal and the documentation.

    Args:
        law: An entry of `laws.CATALOGUE`.

    Returns:
        Heading -> lines, in reading order. Headings without content are left out.

    Example:
        >>> from scaletune import laws
        >>> parts = laws.sections(laws.law("kaplan_lr"))
        >>> parts["formula"], parts["outputs"]
        (['lr = c0 + c1 * log(N)'], ['lr (peak)'])
    """
    own = [
        f"{name}: {means}; not published, give it with --given {name}=VALUE"
        for name, means in law.unknown.items()
    ]
    parts = {
        "summary": [law.summary],
        "formula": [law.formula],
        "coefficients": [*_coefficients(law), *own],
        "inputs": [_describe_input(entry) for entry in law.inputs],
        "outputs": [f"{name} ({QUANTITIES[name]})" for name in law.gives],
        "fitted range": _ranges(law),
        "held fixed": [f"{name} {value:g}" for name, value in law.held.items()],
        "conditions": [f"{name}: {text}" for name, text in law.conditions.items()],
        "fit and notes": [law.setup],
        "source": [law.source],
        "near-optimal band": [
            f"{name}: a range of a factor {width:g}, in which loss is within 0.25 % of its minimum"
            for name, width in law.band.items()
        ],
        "caveats": [*law.warnings, *law.caveats],
        "not confirmed": list(law.unconfirmed),
        "confirmed": [_confirmed(law)],
        "example": [_example(law)],
        "implies": _implied_allocation(law),
    }
    return {heading: lines for heading, lines in parts.items() if lines}


def describe(law: Law) -> str:
    """Returns one law in full as text for the terminal, with a worked example."""
    rows = [
        _row(heading if i == 0 else "", f"- {line}" if heading in LISTS else line)
        for heading, lines in sections(law).items()
        for i, line in enumerate(lines)
    ]
    return "\n".join([f"{law.id}: {law.name}", *rows])


def listing(laws: Iterable[Law]) -> str:
    """Returns a table with one line per law; MARKS are explained below it."""
    rows = [("id", "kind", "gives", "needs", "source")]
    for law in laws:
        needs = ", ".join(
            dict.fromkeys(entry.column for entry in law.inputs if entry.default is None)
        )
        mark = " ?" if law.unknown else "" if law.confirmed else " *"
        gives, source = ", ".join(law.gives), law.source.split(";")[0]
        rows.append(
            (law.id + mark, law.kind, _shorten(gives), _shorten(needs), _shorten(source, 60))
        )
    if len(rows) == 1:
        return "no law matches"
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    notes = [
        f"{mark} {means}"
        for mark, means in MARKS.items()
        if any(row[0].endswith(f" {mark}") for row in rows)
    ]
    return "\n".join([*lines, *notes])


def _shorten(text: str, most: int = CELL) -> str:
    return textwrap.shorten(text, most, placeholder=" …")


def _row(label: str, text: str) -> str:
    """A label and its text, wrapped with a hanging indent."""
    head = f"  {label}".ljust(INDENT - 1) + " "
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * INDENT, break_long_words=False
    )


def _describe_input(entry: Input) -> str:
    """Symbol, meaning, command-line option, and what is used when the input is not given."""
    otherwise = (
        f", default {entry.default:g}"
        if entry.default is not None
        else "".join(f", or {option(name)}" for name in entry.instead)
    )
    return f"{entry.symbol}: {entry.means} ({option(entry.column)}{otherwise})"


def _numbers(values: Mapping[str, Any], sign: str) -> str:
    return ", ".join(
        f"{name}{sign}{value if isinstance(value, str) else format(value, '.6g')}"
        for name, value in values.items()
    )


def _coefficients(law: Law) -> list[str]:
    """Every coefficient with all its digits, and the published intervals."""
    shown = ", ".join(f"{name} = {value:.12g}" for name, value in law.coefficients.items())
    intervals = ", ".join(
        f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in law.intervals.items()
    )
    lines = [shown, f"intervals ({law.level}): {intervals}" if intervals else ""]
    return [line for line in lines if line]


def _confirmed(law: Law) -> str:
    """Whether each coefficient was read in a source."""
    if not law.confirmed:
        return "no"
    return "every coefficient" if law.coefficients else "the form; it has no published coefficients"


def _implied_allocation(law: Law) -> list[str]:
    """For a law of Chinchilla's form: the compute-optimal allocation with 6 N D = C."""
    if law.function is not chinchilla:
        return []
    best = frontier(BUDGET, **law.coefficients)
    exponent = law.coefficients["beta"] / (law.coefficients["alpha"] + law.coefficients["beta"])
    return [
        f"compute-optimal N grows as C**{exponent:.3g}; "
        f"{best['tokens_per_param']:.4g} tokens per parameter at {BUDGET:g} FLOPs"
    ]


def _ranges(law: Law) -> list[str]:
    """The range of the runs behind the law, and how far it was validated beyond them."""
    fitted = [
        f"{name} {low:.4g} to {high:.4g}" if low else f"{name} up to {high:.4g}"
        for name, (low, high) in law.fitted.items()
    ]
    return fitted + [f"validated up to {name} {high:.3g}" for name, high in law.validated.items()]


def _example(law: Law) -> str:
    """`N = 1e+09, D = 2e+10 -> lr 0.001`"""
    worked = law.example()
    illustration = f"{', '.join(law.unknown)} for illustration only: " if law.unknown else ""
    return f"{illustration}{_numbers(worked['inputs'], ' = ')} -> {_numbers(worked['values'], ' ')}"
