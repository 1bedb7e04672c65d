"""Laws as text: one in full, or many in a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from scaletune.laws.allocation_loss import frontier
from scaletune.laws.columns import QUANTITIES, option
from scaletune.laws.entry import Input, Law
from scaletune.laws.loss import chinchilla

WIDTH, INDENT, CELL = 120, 18, 38
BUDGET = 5.88e23  # FLOPs of Chinchilla, where laws of its form are compared
MARKS = {
    "*": "a coefficient is unconfirmed",
    "?": "a coefficient is not published: it needs yours, see `scaletune laws ID`",
}


def describe(law: Law) -> str:
    """One law in full, with a number worked out by its function."""
    rows = [("formula", law.formula), ("with", _coefficients(law))]
    rows += [
        (name, f"{means}; not published: --given {name}=VALUE")
        for name, means in law.unknown.items()
    ]
    rows += [(entry.symbol, _input(entry)) for entry in law.inputs]
    rows += [
        ("gives", ", ".join(f"{name} ({QUANTITIES[name]})" for name in law.gives)),
        ("range", _ranges(law)),
    ]
    rows += [("held at", f"{name} {value:g}") for name, value in law.held.items()]
    rows += [*law.conditions.items(), ("setup", law.setup), ("source", law.source)]
    rows += [
        ("band", f"a factor {width:g} in {name}, where loss is within 0.25 %")
        for name, width in law.band.items()
    ]
    rows += [("beware", text) for text in (*law.cautions, *law.traps)]
    rows += [("UNCONFIRMED", text) for text in law.unconfirmed]
    rows += [("confirmed", _confirmed(law)), ("example", _example(law)), ("implies", _implied(law))]
    return "\n".join(
        [f"{law.id}: {law.name}", *(_row(label, text) for label, text in rows if text)]
    )


def listing(laws: Iterable[Law]) -> str:
    """A table of laws, one line each; see MARKS."""
    rows = [("id", "kind", "gives", "needs", "source")]
    for law in laws:
        needs = ", ".join(
            dict.fromkeys(entry.column for entry in law.inputs if entry.default is None)
        )
        mark = " ?" if law.unknown else "" if law.confirmed else " *"
        rows.append(
            (
                law.id + mark,
                law.kind,
                _short(", ".join(law.gives)),
                _short(needs),
                _short(law.source.split(";")[0], 60),
            )
        )
    if len(rows) == 1:
        return "no law is like that"
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            *(
                f"{mark} {means}"
                for mark, means in MARKS.items()
                if any(row[0].endswith(f" {mark}") for row in rows)
            ),
        ]
    )


def _short(text: str, most: int = CELL) -> str:
    return textwrap.shorten(text, most, placeholder=" …")


def _row(label: str, text: str) -> str:
    """A label and its text, wrapped with a hanging indent."""
    head = f"  {label}".ljust(INDENT - 1) + " "
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * INDENT, break_long_words=False
    )


def _input(entry: Input) -> str:
    """What it is, how it is given, what is taken where it is not."""
    taken = (
        f", or {entry.default:g}"
        if entry.default is not None
        else "".join(f", or {option(name)}" for name in entry.instead)
    )
    return f"{entry.means} ({option(entry.column)}{taken})"


def _numbers(values: Mapping[str, Any], sign: str) -> str:
    return ", ".join(
        f"{name}{sign}{value if isinstance(value, str) else format(value, '.6g')}"
        for name, value in values.items()
    )


def _coefficients(law: Law) -> str:
    """Every coefficient in full, then the published intervals."""
    shown = ", ".join(f"{name} = {value:.12g}" for name, value in law.coefficients.items())
    intervals = ", ".join(
        f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in law.intervals.items()
    )
    return f"{shown}; intervals ({law.level}): {intervals}" if intervals else shown


def _confirmed(law: Law) -> str:
    """Whether each coefficient was seen in a source."""
    if not law.confirmed:
        return "no"
    return (
        "every coefficient" if law.coefficients else "the form; it has no coefficients of its own"
    )


def _implied(law: Law) -> str:
    """Of a law of Chinchilla's form: the split of compute that loses least, 6 N D = C."""
    if law.function is not chinchilla:
        return ""
    best, exponent = (
        frontier(BUDGET, **law.coefficients),
        law.coefficients["beta"] / (law.coefficients["alpha"] + law.coefficients["beta"]),
    )
    return f"the best N grows as C**{exponent:.3g}; at {BUDGET:g} FLOPs {best['tokens_per_param']:.4g} tokens per parameter"


def _ranges(law: Law) -> str:
    """The runs behind the law, and how far it was checked beyond them."""
    parts = [
        f"{name} {low:.4g} to {high:.4g}" if low else f"{name} up to {high:.4g}"
        for name, (low, high) in law.fitted.items()
    ]
    return ", ".join(
        parts + [f"checked up to {name} {high:.3g}" for name, high in law.validated.items()]
    )


def _example(law: Law) -> str:
    """`N = 1e+09, D = 2e+10 -> lr 0.001`"""
    worked = law.example()
    illustration = f"with {', '.join(law.unknown)} for illustration only: " if law.unknown else ""
    return f"{illustration}{_numbers(worked['inputs'], ' = ')} -> {_numbers(worked['values'], ' ')}"
