"""The catalogue of published laws. To add one: an entry in the file of its kind, a row in the tables of tests/test_laws_numbers.py."""

from __future__ import annotations

from scaletune.errors import UserError, nearest
from scaletune.laws import (
    allocation,
    allocation_loss,
    batch,
    compute,
    critical_batch,
    downstream,
    forms,
    learning_rate,
    learning_rate_moe,
    loss,
    loss_compute,
    loss_overtrained,
    loss_size,
    loss_steps,
    loss_wide,
    moe,
    parametrization,
    precision,
    repetition,
    schedule,
    text,
    transfer,
    weight_decay,
)
from scaletune.laws.columns import COLUMNS
from scaletune.laws.columns import QUANTITIES as UNITS
from scaletune.laws.entry import Input, Law
from scaletune.laws.query import answers, batch_of, consult, pairing
from scaletune.laws.text import describe

__all__ = [
    "CATALOGUE",
    "COLUMNS",
    "KINDS",
    "UNITS",
    "Input",
    "Law",
    "answers",
    "batch_of",
    "consult",
    "describe",
    "law",
    "listing",
    "pairing",
    "select",
]

FILES = (
    learning_rate, learning_rate_moe, batch, transfer, parametrization, critical_batch, weight_decay, compute, allocation, allocation_loss,
    loss, loss_wide, loss_overtrained, loss_size, loss_compute, loss_steps, repetition, moe, precision, downstream, schedule, forms,
)  # fmt: skip
CATALOGUE: dict[str, Law] = {entry.id: entry for file in FILES for entry in file.LAWS}
KINDS = tuple(dict.fromkeys(entry.kind for entry in CATALOGUE.values()))


def law(law_id: str) -> Law:
    """The published law of this id; UserError with the nearest known id when there is none."""
    if law_id not in CATALOGUE:
        raise UserError(f"there is no law {law_id!r}{nearest(law_id, CATALOGUE)}")
    return CATALOGUE[law_id]


def select(
    *,
    kind: str | None = None,
    gives: str | None = None,
    text: str | None = None,
    confirmed: bool = False,
) -> list[Law]:
    """Laws of a kind (`loss` has loss_size and its like in it), that give a quantity, that mention a text anywhere (any case), all coefficients confirmed."""
    given = dict.fromkeys(name for entry in CATALOGUE.values() for name in entry.gives)
    for name, value, known in (("kind", kind, KINDS), ("gives", gives, given)):
        if value is not None and value not in known:
            raise UserError(
                f"`{name}` must be one that a law has, but got {value!r}{nearest(value, known)}"
            )
    return [
        entry
        for entry in CATALOGUE.values()
        if (kind is None or f"{entry.kind}_".startswith(f"{kind}_"))
        and (gives is None or gives in entry.gives)
        and (text is None or text.lower() in f"{entry.id} {describe(entry)}".lower())
        and not (confirmed and not entry.confirmed)
    ]


def listing(entries: list[Law] | None = None) -> str:
    """The whole catalogue or a choice of it as a table, one line a law."""
    return text.listing(CATALOGUE.values() if entries is None else entries)
