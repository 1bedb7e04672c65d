"""The tokens that each run was trained on, and the optimizer steps it made.

The order: logged tokens, tokens of a setting, sequences * sequence length, steps * tokens per step.
A 0 from a tracker that did not count is absent. W&B's own counter `_step` counts log calls: it is
the iteration only if it has gaps or agrees with the planned number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scaletune.importing.names import (
    PLAN_NAMES,
    REACHED_NAMES,
    SAMPLES_NAMES,
    USUAL_NAMES,
    find_names,
)
from scaletune.importing.run import CALLS, REACHED_TOKENS, STEPS, RunTable

if TYPE_CHECKING:
    import pandas as pd

CLOSE = 0.02  # steps within this fraction of the plan are the plan: counters start at 0 or at 1


def numbers(table: pd.DataFrame, name: str) -> pd.Series:
    """A column as numbers above 0; anything else is missing."""
    import pandas as pd

    values = pd.to_numeric(table[name], errors="coerce").astype(float)
    return values.where((values > 0) & (values < float("inf")))


def first_of(table: pd.DataFrame, names: list[str]) -> tuple[pd.Series, list[str]]:
    """Row by row the first number above 0 among columns, and the columns that were used."""
    import pandas as pd

    merged = pd.Series(float("nan"), index=table.index)
    used = []
    for name in names:
        values = numbers(table, name)
        if (merged.isna() & values.notna()).any():
            used.append(name)
            merged = merged.fillna(values)
    return merged, used


def planned_steps(runs: RunTable) -> tuple[pd.Series, list[str]]:
    """The number of optimizer steps that each run was to make."""
    names = find_names(runs.table.columns, PLAN_NAMES)
    if runs.origin_known:  # a setting `steps` is a plan
        names += find_names(runs.table.columns, ("steps", "num_steps"))
    return first_of(runs.table, [name for name in names if name not in runs.history])


def reached_steps(runs: RunTable) -> tuple[pd.Series, list[str]]:
    """The number of optimizer steps that each run made, as it was logged."""
    table = runs.table
    names = find_names(table.columns, REACHED_NAMES)
    if runs.origin_known:  # `steps` of a config is a plan
        names = [name for name in names if name in runs.history]
    return first_of(table, names + [name for name in (STEPS,) if name in table])


def count_steps(runs: RunTable) -> tuple[pd.Series, str]:
    """The optimizer steps of each run, and a sentence on where they come from."""
    reached, names = reached_steps(runs)
    planned, plans = planned_steps(runs)
    source = " and ".join(f"`{name}`" for name in names if not name.startswith("_"))
    source = source or "the last step of the log"
    if CALLS in runs.table:
        calls = numbers(runs.table, CALLS)
        confirmed = calls.where((calls + 1 - planned).abs() <= CLOSE * planned + 1)
        if (reached.isna() & confirmed.notna()).any():
            source = "the number of log calls, which agrees with the planned steps"
        reached = reached.fillna(confirmed)
    close = (reached - planned).abs() <= CLOSE * planned
    steps = reached.where(~close, planned)
    if plans and (steps.isna() & planned.notna()).any():
        if "status" in runs.table:
            planned = planned.where(runs.table["status"] == "done")
        steps = steps.fillna(planned)
        source = f"the planned steps `{plans[0]}`, since no iteration was logged"
    return steps, source


LOGGED_EVERY_STEP = (
    "steps are the number of log calls, which is right only if the runs logged every step once:"
    " otherwise give --map tokens=NAME"
)


def add_tokens(runs: RunTable, tokens_per_step: float | None, mapped: set[str]) -> RunTable:
    """Adds `tokens`, `batch_tokens` and `steps`, with a sentence on each that is derived."""
    table, notes = runs.table, list(runs.notes)
    if tokens_per_step:
        known = first_of(table, [name for name in ("batch_tokens",) if name in table])[0]
        table = table.assign(batch_tokens=known.fillna(tokens_per_step))
    steps, source = count_steps(RunTable(table, runs.history, runs.origin_known))
    if tokens_per_step and CALLS in table and steps.isna().any():
        steps, source = steps.fillna(numbers(table, CALLS) + 1), "the number of log calls"
        runs = replace(runs, warnings=[*runs.warnings, LOGGED_EVERY_STEP])
    if steps.notna().any() and "steps" not in table:
        table = table.assign(steps=steps)
        runs = replace(runs, history=runs.history | {"steps"})
    if "tokens" in mapped:
        return _with(runs, table, notes)
    names = find_names(table.columns, USUAL_NAMES["tokens"])
    names.sort(key=lambda name: runs.origin_known and name not in runs.history)
    tokens, used = first_of(table, names)
    if used and used != ["tokens"]:
        columns = " and ".join(f"`{name}`" for name in used)
        notes.append(
            f"`tokens` is read from the column {columns} (--map tokens=NAME reads another one)"
        )
    logged = [name for name in names if name in runs.history]
    reached = first_of(table, logged)[0] if runs.origin_known else tokens * float("nan")
    for values, sentence in _derived(table, steps, source, tokens_per_step):
        if (tokens.isna() & values.notna()).any():
            tokens, reached = tokens.fillna(values), reached.fillna(values.where(tokens.isna()))
            notes.append(f"{sentence} (--map tokens=NAME reads a column)")
    zero = [name for name in names if _is_zero(table[name])]
    if tokens.notna().any():
        return _with(runs, table.assign(tokens=tokens, **{REACHED_TOKENS: reached}), notes)
    if names and not zero:  # text, which the check of the table reports
        return _with(runs, table, notes)
    runs = _with(runs, table.drop(columns="tokens", errors="ignore"), notes)
    runs.absent["tokens"] = _absence(zero, CALLS in table)
    return runs


def _is_zero(values: pd.Series) -> bool:
    """Whether a column holds nothing but 0 and missing values."""
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce")
    return bool((numbers == 0).any() and (numbers.fillna(0) == 0).all())


def _with(runs: RunTable, table: pd.DataFrame, notes: list[str]) -> RunTable:
    return replace(runs, table=table, notes=notes)


def _derived(
    table: pd.DataFrame, steps: pd.Series, source: str, tokens_per_step: float | None
) -> list[tuple[pd.Series, str]]:
    """(tokens, sentence) of each way to compute tokens from other columns."""
    ways = []
    samples, names = first_of(table, find_names(table.columns, SAMPLES_NAMES))
    if names and "seq_len" in table:
        sentence = f"`tokens` is computed as `{names[0]}` * seq_len"
        ways.append((samples * numbers(table, "seq_len"), sentence))
    if "batch_tokens" in table:
        size = f"{tokens_per_step:g}" if tokens_per_step else "batch_tokens"
        sentence = f"`tokens` is computed as steps * {size}; steps are from {source}"
        ways.append((steps * numbers(table, "batch_tokens"), sentence))
    return ways


def _absence(zero: list[str], calls: bool) -> str:
    """Why there are no tokens, and what to do."""
    remedy = "give --tokens-per-step N (sequences per step * sequence length) or --map tokens=NAME"
    if zero:
        trainer = any("num_input_tokens_seen" in name for name in zero)
        hint = " (a Trainer counts with include_num_input_tokens_seen=True)" if trainer else ""
        return f"`{zero[0]}` is 0 in every run: the tracker did not count tokens{hint}; {remedy}"
    if calls:
        return (
            "the runs log no iteration, and the tracker's own counter counts log calls;"
            f" {remedy}, or --map steps=NAME"
        )
    return f"no column counts tokens; {remedy}"
