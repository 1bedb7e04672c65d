"""The one error a user can cause, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user asked breaks a rule: one sentence with the rule and the value. The command line exits 2 on it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (nearest: 'lr')"`` when a known name is close to `name`, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" (nearest: {close[0]!r})" if close else f" (known: {', '.join(known)})"
