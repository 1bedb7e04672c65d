"""Laws as text: one in full, or all in a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

from scaletune.laws.entry import Law

WIDTH, INDENT = 120, 18
UNITS = {"lr": "lr (peak)", "batch_tokens": "batch_tokens (tokens per optimizer step)", "loss": "loss (nats per token)"}


def describe(law: Law) -> str:
    """One law in full, with a number worked out by its function."""
    rows = [("formula", law.formula), ("with", _coefficients(law))]
    rows += [(entry.symbol, entry.means) for entry in law.inputs]
    rows += [("gives", ", ".join(UNITS.get(name, name) for name in law.gives)), ("range", _ranges(law))]
    rows += [("held at", f"{name} {value:g}") for name, value in law.held.items()]
    rows += [*law.conditions.items(), ("setup", law.setup), ("source", law.source)]
    rows += [("band", f"a factor {width:g} in {name}, where loss is within 0.25 %") for name, width in law.band.items()]
    rows += [("beware", text) for text in (*law.cautions, *law.traps)]
    rows += [("UNCONFIRMED", text) for text in law.unconfirmed]
    rows += [("confirmed", "every coefficient" if law.confirmed else "no"), ("example", _example(law))]
    return "\n".join([f"{law.id}: {law.name}", *(_row(label, text) for label, text in rows if text)])


def listing(laws: Iterable[Law]) -> str:
    """A table of laws, one line each; `*` marks the ones with an unconfirmed coefficient."""
    rows = [("id", "gives", "needs", "source")]
    for law in laws:
        needs = ", ".join(dict.fromkeys(entry.column for entry in law.inputs))
        rows.append((law.id + ("" if law.confirmed else " *"), ", ".join(law.gives), needs, law.source.split(";")[0]))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
    return "\n".join([*lines, "* a coefficient is unconfirmed"] if any(" *" in row[0] for row in rows) else lines)


def _row(label: str, text: str) -> str:
    """A label and its text, wrapped with a hanging indent."""
    head = f"  {label}".ljust(INDENT - 1) + " "
    return textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=" " * INDENT, break_long_words=False)


def _numbers(values: Mapping[str, float], sign: str) -> str:
    return ", ".join(f"{name}{sign}{value:.6g}" for name, value in values.items())


def _coefficients(law: Law) -> str:
    """Every coefficient in full, then the published intervals."""
    shown = ", ".join(f"{name} = {value:.12g}" for name, value in law.coefficients.items())
    intervals = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in law.intervals.items())
    return f"{shown}; intervals ({law.level}): {intervals}" if intervals else shown


def _ranges(law: Law) -> str:
    """The runs behind the law, and how far it was checked beyond them."""
    parts = [f"{name} {low:.4g} to {high:.4g}" if low else f"{name} up to {high:.4g}" for name, (low, high) in law.fitted.items()]
    return ", ".join(parts + [f"checked up to {name} {high:.3g}" for name, high in law.validated.items()])


def _example(law: Law) -> str:
    """`N = 1e+09, D = 2e+10 -> lr 0.001`"""
    worked = law.example()
    return f"{_numbers(worked['inputs'], ' = ')} -> {_numbers(worked['values'], ' ')}"
