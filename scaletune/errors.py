"""`UserError`, the one error that users cause, and the hint for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An input breaks a rule. The message is one sentence: the rule, the value, the way out.

    The command line prints the message and exits with status 2.

    Example:
        >>> import scaletune as st
        >>> try:
        ...     st.predict(law="steplaw", n_params=1e9, tokens=1e11)
        ... except st.UserError as error:
        ...     "steplaw_lr_bs" in str(error)
        True
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (nearest: 'lr')"` if a known name is similar to `name`, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" (nearest: {close[0]!r})" if close else f" (known: {', '.join(known)})"
