"""Finds own settings (`my.dropout`, `model.layers`, `trainer.version`) that differ between runs
which a fit takes for repeats of one run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from scaletune.fitting.missing_columns import in_expression
from scaletune.fitting.mixed_settings import last_part
from scaletune.fitting.own_records import own_rows
from scaletune.fitting.table import levels

OWN = (
    *("my.", "model.", "trainer."),
    *("parametrization.", "optimizer.", "schedule.", "training.", "data."),
)
"""How the columns of own settings start: `scaletune.records.trial.own_settings`."""
COUNT = "n_params"
SHOWN, WIDEST = 3, 60  # columns that a sentence names, characters of a value


def own_setting_doubts(
    runs: pd.DataFrame, setting: Collection[str], scales: Collection[str] = ()
) -> list[str]:
    """Sentences on own settings that differ within a setting, so that losses are mixed.

    Settings that follow the size, such as the number of heads, differ between settings only.

    Args:
        runs: Finished runs.
        setting: Columns of numbers that tell settings apart.
        scales: Those of which values that differ by less than 1 % are one value.
    """
    values = _own_values(runs)
    mixed = mixed_settings(runs, setting, scales)
    names = [str(name) for name in values if name not in mixed]
    version = [name for name in names if name.startswith("trainer.")]
    return [
        *([_mixed_sentence(runs, values, mixed)] if mixed else []),
        *(_code_sentence(values[name], name) for name in version if values[name].nunique() > 1),
        *_stated_size_doubt(runs),
    ]


def mixed_settings(
    runs: pd.DataFrame, setting: Collection[str], scales: Collection[str] = ()
) -> list[str]:
    """The own settings that differ between runs of one setting: see `own_setting_doubts`."""
    values = _own_values(runs)
    keys = [_key(runs[name], name in scales) for name in setting if name in runs]
    lr = _codes(runs["lr"]) if "lr" in runs and runs["lr"].nunique() > 1 else b""
    return [
        str(name)
        for name in values
        if _differs(values[name], keys) and _codes(values[name]) != lr  # it goes with the lr
    ]


def _own_values(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns of own settings, as text that is equal for equal values. A seed is none."""
    if "point" not in runs:
        return pd.DataFrame(index=runs.index)
    names = [str(name) for name in runs if str(name).startswith(OWN)]
    names = [name for name in names if not last_part(name).endswith("seed")]
    return pd.DataFrame({name: runs[name].map(_plain) for name in names}, index=runs.index)


def _plain(value: Any) -> str | None:
    """A value as text that is equal for equal values; None: not stated."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = float(value)
    return json.dumps(value, default=str)


def _key(column: pd.Series, is_scale: bool) -> pd.Series:
    """A number per value."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    known = numbers[numbers.notna()]
    if is_scale and len(known):
        return pd.Series(levels(known.to_numpy()), index=known.index).reindex(column.index)
    return numbers


def _codes(column: pd.Series) -> bytes:
    """Equal for columns that sort the rows alike."""
    return pd.factorize(column)[0].tobytes()


def _differs(values: pd.Series, keys: list[pd.Series]) -> bool:
    if values.nunique(dropna=False) < 2:
        return False
    groups = values.groupby(keys, dropna=False) if keys else values.groupby(lambda _: 0)
    return bool((groups.nunique(dropna=False) > 1).any())


def _mixed_sentence(runs: pd.DataFrame, values: pd.DataFrame, mixed: list[str]) -> str:
    shown = [f"`{name}` ({_listed(values[name])})" for name in mixed[:SHOWN]]
    more = f" and {len(mixed) - SHOWN} more settings" if len(mixed) > SHOWN else ""
    return (
        f"{' and '.join(shown)}{more} {'differs' if len(mixed) == 1 else 'differ'} between runs of"
        " one setting, so their losses are mixed: fit each value separately with --where"
        f" {shlex.quote(_condition(runs, values, mixed))}"
    )


def _condition(runs: pd.DataFrame, values: pd.DataFrame, names: list[str]) -> str:
    """The condition that selects the most frequent values."""
    stated = [name for name in names if values[name].notna().any()]
    counts = values[stated].dropna().value_counts(sort=True)
    row = values[stated].dropna()
    if len(counts):
        most = counts.index[0]
        row = row[(row == list(most)).all(axis=1)]
    chosen = runs.loc[row.index[0]] if len(row) else runs.iloc[0]
    return " and ".join(f"{in_expression(name)} == {_literal(chosen[name])}" for name in stated)


def _literal(value: Any) -> str:
    """A value as an expression writes it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _listed(values: pd.Series) -> str:
    distinct = sorted((json.loads(value) for value in values.dropna().unique()), key=_order)
    shown = [_short(value) for value in distinct[:4]]
    shown += ["..."] if len(distinct) > 4 else ["not stated"] * bool(values.isna().any())
    return ", ".join(shown)


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers by their size, then all else by its text."""
    is_number = isinstance(value, int | float)
    return not is_number, value if is_number else str(value)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}..."


def _code_sentence(values: pd.Series, name: str) -> str:
    """The trainer's code differs between settings."""
    return (
        f"`{name}` ({_listed(values)}) differs between settings: the law compares runs of different"
        " code; train all of them with one"
    )


def _stated_size_doubt(runs: pd.DataFrame) -> list[str]:
    """A sentence if the recipe states one `model.n_params` for models of several widths."""
    if not {"point", "n_params", "width"} <= set(runs):
        return []
    own = runs[own_rows(runs)]
    stated = [point.get("model", {}).get("n_params") for point in own["point"]]
    rows = own[own["n_params"] == pd.Series(stated, index=own.index, dtype=float)]
    sizes = [
        (float(str(key)), sorted(group["width"].unique())) for key, group in rows.groupby(COUNT)
    ]
    return [
        f"the recipe states `model.n_params` {n_params:g} for models of width"
        f" {' and '.join(f'{width:g}' for width in widths[:SHOWN])}: state it for each in"
        " [[cells]], or let `trainer.describe` count it"
        for n_params, widths in sizes
        if len(widths) > 1
    ][:1]
