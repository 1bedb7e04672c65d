"""The result of a trial in the log that its trainer wrote, by the readers of `importing`."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("loss", "tokens", "n_params", "n_params_total", "batch_tokens", "flops")


def read_own_log(path: str, tokens_per_step: float | None = None) -> tuple[dict[str, Any], str]:
    """The result of the one run in a log.

    Args:
        path: A file or folder that `scaletune fit` can read.
        tokens_per_step: Tokens of one step, for a log that counts steps and no tokens.

    Returns:
        The result as a report, and what is doubtful about it, or nothing.

    Raises:
        UserError: There is no such log, it has no finished run with a loss, or several.
    """
    from scaletune import importing

    table, notes = importing.trials(path, tokens_per_step=tokens_per_step)
    done = table[table["status"] == "done"] if "status" in table else table
    done = done[done["loss"].notna()] if "loss" in done else done.iloc[:0]
    if len(done) != 1:
        got = _describe(table, len(done))
        raise UserError(f"`{path}` must hold one finished run with a loss, but got {got}")
    row = done.iloc[0].to_dict()
    numbers = {name: row[name] for name in COLUMNS if name in row}
    report = {n: v for n, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}
    return report, _doubt(notes)


def _describe(table: pd.DataFrame, done: int) -> str:
    """How many runs a log has, and what is wrong with one that did not finish."""
    if done:
        return f"{done}: give each trial a folder of its own, as `{{run_dir}}`"
    messages = [m for m in table.get("message", []) if isinstance(m, str) and m]
    return f"none{': ' + messages[0] if messages else ''}"


def _doubt(notes: list[str]) -> str:
    """A sentence if the loss is that of the training data."""
    column = next((hit[1] for note in notes if (hit := _LOSS.search(note))), "")
    if "train" not in column:
        return ""
    return f"its log has no held-out loss, so its training loss `{column}` counts"


_LOSS = re.compile(r"`loss` is read from the column `([^`]+)`")
