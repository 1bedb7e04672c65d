"""Several sources as one table: runs that two sources share are joined, counted once or told apart.

A table of settings and a table of losses with the same ids are one table. A run that is twice with
the same numbers is one run; runs that share an id and differ in their settings are two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = ("n_params", "lr")
KEYS = ("n_params", "tokens", "batch_tokens", "lr", "seed", "loss")


def merge_sources(tables: Sequence[pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """One table of the tables of several sources, and sentences about what was joined."""
    import pandas as pd

    if len(tables) == 2 and (joined := _join(*tables)) is not None:
        return joined, [f"the two sources are joined by `id`: {len(joined)} runs"]
    table = pd.concat(tables, ignore_index=True)
    if len(tables) < 2 or "id" not in table:
        return table, []
    source = np.repeat(np.arange(len(tables)), [len(part) for part in tables])
    table, notes = _drop_copies(table, source)
    return _tell_apart(table, source[table.index], notes)


def _join(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame | None:
    """The settings of one table with the losses of the other, if neither has both."""
    tables = (first, second)
    if not all("id" in table and table["id"].is_unique for table in tables):
        return None
    losses = [table for table in tables if "loss" in table and not {"lr", "n_params"} & set(table)]
    settings = [table for table in tables if "loss" not in table]
    if len(losses) != 1 or len(settings) != 1:
        return None
    ends, runs = losses[0].set_index("id"), settings[0].set_index("id")
    ends.index, runs.index = ends.index.astype(str), runs.index.astype(str)
    if not set(ends.index) & set(runs.index):
        return None
    joined = runs.combine_first(ends).loc[runs.index]
    if "status" in ends:
        known = ends.reindex(runs.index)
        worse = (known["status"].fillna("done") != "done") & (joined["status"] == "done")
        joined.loc[worse, ["status", "message"]] = known.loc[worse, ["status", "message"]]
    absent = ~joined.index.isin(ends.index) & (joined["status"] == "done")
    joined.loc[absent, ["status", "message"]] = ["failed", "it is not in the table of losses"]
    result: pd.DataFrame = joined.reset_index()
    return result


def _drop_copies(table: pd.DataFrame, source: np.ndarray) -> tuple[pd.DataFrame, list[str]]:
    """The table without runs that a later source repeats with the same numbers."""
    keys = ["id", *(name for name in KEYS if name in table)]
    first = table.assign(source=source).groupby(keys, dropna=False)["source"].transform("min")
    copies = table.duplicated(keys) & (source > first) & table["id"].notna()
    if not copies.any():
        return table, []
    note = f"{int(copies.sum())} runs are in several sources with the same numbers: counted once"
    return table[~copies], [note]


def _tell_apart(
    table: pd.DataFrame, source: np.ndarray, notes: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The table with different ids for runs of different settings that share one."""
    import pandas as pd

    names = [name for name in SETTINGS if name in table]
    sources = pd.Series(source, index=table.index)
    shared = table["id"].notna() & (sources.groupby(table["id"]).transform("nunique") > 1)
    if not shared.any() or not names:
        return table.reset_index(drop=True), notes
    settings = table[names].astype(str).agg("|".join, axis=1)
    counts = settings[shared].groupby([table["id"][shared]]).nunique()
    sizes = sources[shared].groupby(table["id"][shared]).nunique()
    different = shared & table["id"].isin(counts.index[counts == sizes])
    if different.any():
        renamed = table["id"].astype(str) + "#" + (sources + 1).astype(str)
        table = table.assign(id=table["id"].mask(different, renamed))
        notes = [
            *notes,
            f"{int(different.sum())} runs of several sources share an id but not their settings:"
            " they are taken for different runs, named ID#SOURCE",
        ]
    return table.reset_index(drop=True), notes
