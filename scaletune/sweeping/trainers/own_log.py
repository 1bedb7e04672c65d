"""The result of a trial in the log that its trainer wrote, by the readers of `importing`."""

from __future__ import annotations

import math
from typing import Any

from scaletune.errors import UserError

COLUMNS = ("loss", "tokens", "n_params", "n_params_total", "batch_tokens", "flops")


def read_own_log(path: str) -> dict[str, Any]:
    """The result of the one run in a log, as a report.

    Args:
        path: A file or folder that `scaletune fit` can read.

    Raises:
        UserError: There is no such log, it has no finished run with a loss, or several.
    """
    from scaletune import importing

    table, notes = importing.trials(path)
    done = table[table["status"] == "done"] if "status" in table else table
    done = done[done["loss"].notna()] if "loss" in done else done.iloc[:0]
    if len(done) != 1:
        why = f" ({notes[0]})" if notes else ""
        raise UserError(
            f"`{path}` must hold one finished run with a loss, but got {len(done)}{why}"
        )
    row = done.iloc[0].to_dict()
    numbers = {name: row[name] for name in COLUMNS if name in row}
    return {n: v for n, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}
