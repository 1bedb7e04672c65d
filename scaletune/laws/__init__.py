"""The catalogue of published laws. To add one: an entry in the file of its kind, a row in the table of tests/test_laws.py."""

from __future__ import annotations

from scaletune.errors import UserError, nearest
from scaletune.laws import batch, learning_rate, loss, showing
from scaletune.laws.consulting import consult
from scaletune.laws.entry import Input, Law
from scaletune.laws.showing import describe

__all__ = ["CATALOGUE", "Input", "Law", "consult", "describe", "law", "listing"]

CATALOGUE: dict[str, Law] = {entry.id: entry for kind in (learning_rate, batch, loss) for entry in kind.LAWS}


def law(law_id: str) -> Law:
    """The published law of this id; UserError with the nearest known id when there is none."""
    if law_id not in CATALOGUE:
        raise UserError(f"there is no law {law_id!r}{nearest(law_id, CATALOGUE)}")
    return CATALOGUE[law_id]


def listing() -> str:
    """The whole catalogue as a table, one line a law."""
    return showing.listing(CATALOGUE.values())
