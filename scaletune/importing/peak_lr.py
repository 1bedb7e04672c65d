"""The peak learning rate of each run, among the columns that may hold it.

Trackers keep the last value of what was logged, and the last value of a learning rate is that of a
decayed schedule, often a tenth of the peak. A setting has priority over a logged value; of a
history the reader gives the peak; of columns whose origin is not known, the one that is nowhere
below the others is the peak, since no logged value exceeds it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.importing.names import USUAL_NAMES, find_names, is_lr
from scaletune.importing.run import RunTable

if TYPE_CHECKING:
    import pandas as pd

SAME = 1.02  # learning rates within this factor are equal: logs round, and miss the peak
LOGGED = re.compile(r"^(train|trainer|optim|training|lr)[/-]|^lr-|_group|\(group")
"""Names that trackers give to logged learning rates, in a table whose origin is not known."""
MINIMA = ("min_lr", "lr_min", "final_lr", "lr_final", "lr_end", "min_learning_rate", "lr_min_value")


@dataclass(frozen=True)
class PeakLr:
    """The peak learning rates, with what is assumed and what is doubtful."""

    values: pd.Series
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def find_peak_lr(runs: RunTable) -> PeakLr | None:
    """The peak learning rate of each run; None if no column holds a learning rate.

    Raises:
        UserError: The only learning rates are last, decayed values.
    """
    columns = {name: _positive(runs.table[name]) for name in _candidates(runs.table)}
    columns = {name: values for name, values in columns.items() if values.notna().any()}
    last = {name: reason for name in columns if (reason := _why_last(runs, name, columns))}
    usable = [name for name in columns if name not in last]
    if not usable:
        if last:
            raise UserError(_last_only(last))
        return None
    usable.sort(key=lambda name: name in runs.history)
    chosen = _choose(usable, columns)
    others = [name for name in columns if name != chosen]
    values = columns[chosen]
    for name in usable:
        values = values.fillna(columns[name])
    notes, warnings = _compare(runs, chosen, others, columns, last)
    return PeakLr(values, tuple(notes), tuple(warnings))


def _candidates(table: pd.DataFrame) -> list[str]:
    names = [str(column) for column in table.columns]
    usual = find_names(names, USUAL_NAMES["lr"])
    return usual + [name for name in names if is_lr(name) and name not in usual]


def _positive(values: pd.Series) -> pd.Series:
    """Numbers above 0; what is no number is missing, and a 0 stays, as the sign of a last value."""
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    return numbers.where(numbers >= 0)


def _why_last(runs: RunTable, name: str, columns: dict[str, pd.Series]) -> str:
    """Why a column holds last, decayed values and not peaks; "" if it may hold peaks."""
    values, table = columns[name], runs.table
    is_peak = runs.origin_known and not runs.last_values  # the reader gives that of a history
    if is_peak and name in runs.history:
        return ""
    if name in runs.history:
        return "is the last logged value"
    done = values[table["status"] == "done"] if "status" in table else values
    if (done == 0).any():
        return f"is 0 in {int((done == 0).sum())} runs: the last value of a decayed schedule"
    for minimum in find_names(table.columns, MINIMA):
        if _equal(values, _positive(table[minimum])).all():
            return f"equals `{minimum}` in every run: the last value of a decayed schedule"
    if runs.origin_known:
        return ""
    if LOGGED.search(str(name).lower()):
        return "is the last logged value"
    for other, peaks in columns.items():
        both = values.notna() & peaks.notna()
        below = both & (values * SAME < peaks)
        above = both & (peaks * SAME < values)
        if other != name and below.any() and not above.any() and _varies(peaks):
            return f"is below `{other}` in {int(below.sum())} of {int(both.sum())} runs"
    return ""


def _equal(a: pd.Series, b: pd.Series) -> pd.Series:
    return (a <= SAME * b) & (b <= SAME * a)


def _last_only(last: dict[str, str]) -> str:
    name, reason = next(iter(last.items()))
    remedy = f"--map lr={_quote(name)} if it is the peak"
    if reason.startswith("equals"):  # the fit refuses it too
        remedy = "leave that column out if the lr is constant"
    return (
        f"`lr` must be the peak learning rate of each run, but `{name}` {reason}: give the column"
        f" with the peak as --map lr=NAME ({remedy})"
    )


def _quote(name: str) -> str:
    return name if re.fullmatch(r"[\w.]+", name) else f"'`{name}`'"


def _choose(names: list[str], columns: dict[str, pd.Series]) -> str:
    """The first column that varies over runs, since a sweep varies the lr; else the first one."""
    return next((name for name in names if _varies(columns[name])), names[0])


def _varies(values: pd.Series) -> bool:
    known = values.dropna()
    return bool(known.max() > SAME * known.min())


def _compare(
    runs: RunTable,
    chosen: str,
    others: list[str],
    columns: dict[str, pd.Series],
    last: dict[str, str],
) -> tuple[list[str], list[str]]:
    """Sentences about the chosen column and about those that disagree with it."""
    kind = "the peak of the logged" if chosen in runs.history else "the column"
    remedy = "(--map lr=NAME reads another one)"
    values = columns[chosen]
    notes, warnings = [], []
    for other in others:
        both = values.notna() & columns[other].notna()
        different = both & ~_equal(values, columns[other])
        if not different.any():
            continue
        row = int(different.to_numpy().argmax())
        example = f"{values.iloc[row]:.4g} and {columns[other].iloc[row]:.4g} in one run"
        if other in last:
            notes.append(
                f"`lr` is read from {kind} `{chosen}`, not from `{other}`, which"
                f" {last[other]} {remedy}"
            )
            continue
        sentence = (
            f"`lr` is read from {kind} `{chosen}`, but `{other}` differs in {int(different.sum())}"
            f" of {int(both.sum())} runs ({example})"
        )
        above = (different & (columns[other] > values)).any()
        if above or chosen in runs.history:
            warnings.append(f"{sentence}: check which one is the peak lr {remedy}")
        else:
            notes.append(
                f"{sentence}: a setting has priority over a logged value, and an earlier"
                f" usual name over a later one {remedy}"
            )
    if not notes and not warnings and (chosen != "lr" or chosen in runs.history):
        notes.append(f"`lr` is read from {kind} `{chosen}` {remedy}")
    return notes, warnings
