"""Which runs finished: the others are kept as rows with the status "failed" and a reason.

A run is judged by its own plan (planned steps or tokens against those it reached) and by its
siblings (runs of the same size, tokens and batch size that went further). A run that reached its
plan is finished, whatever the tracker's word for its end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletune.importing.columns import STATE_NAMES
from scaletune.importing.names import (
    REACHED_NAMES,
    SCHEDULE_END_NAMES,
    TOKEN_PLAN_NAMES,
    USUAL_NAMES,
    find_names,
)
from scaletune.importing.run import CALLS, LAST, PLANNED_TOKENS, REACHED_TOKENS, STEPS, RunTable
from scaletune.importing.token_count import first_of, numbers, planned_steps, reached_steps
from scaletune.records import FINISHED_SHARE
from scaletune.units import human

if TYPE_CHECKING:
    import pandas as pd

CALLS_SHORT = 0.8  # the same for counts of log calls, where a tracker knows the state
COUNTED_TOKENS = (
    *("tokens_seen", "tokens_trained", "consumed_tokens", "trained_tokens", "n_tokens_seen"),
    *("num_input_tokens_seen", "train/num_input_tokens_seen", "train/tokens_seen"),
)
"""Names of the tokens that a run saw, where `tokens` beside them is its plan."""
EPOCHS = ("epoch", "epochs", "train/epoch", "current_epoch", "epochs_done")
EPOCH_PLANS = ("num_train_epochs", "max_epochs", "num_epochs", "total_epochs", "n_epochs")
SCALES = ("n_params", "tokens", "batch_tokens")
CONSTANT = ("constant", "constant_with_warmup", "none", "constantlr", "constant_lr")
SCHEDULES = ("lr_scheduler_type", "lr_schedule", "schedule", "scheduler", "lr_scheduler")


def judge_by_plan(runs: RunTable) -> RunTable:
    """Marks runs that stopped before their planned steps or tokens, unless their lr had decayed."""
    table = _with_status(runs.table)
    share, reached, planned, unit = _share_of_plan(runs)
    ended = _schedule_ended(runs)
    done = table["status"] == "done"
    short = done & (share < FINISHED_SHARE) & ~ended
    trusted = unit == "steps" or runs.origin_known
    complete = (
        (table["status"] == "failed") & share.between(FINISHED_SHARE, 2 - FINISHED_SHARE) & trusted
    )
    table["message"] = table["message"].mask(short, _shortfall(reached, planned, unit))
    table["status"] = table["status"].mask(short, "failed").mask(complete, "done")
    table["message"] = table["message"].mask(complete, "")
    table = _with_planned_tokens(table, short, share)
    notes = list(runs.notes)
    if kept := int((done & (share < FINISHED_SHARE) & ended).sum()):
        notes.append(
            f"{kept} runs stopped before their planned {unit}, after their lr schedule had ended:"
            " they are used at the tokens they reached"
        )
    if n := int(complete.sum()):
        notes.append(f"{n} runs whose state is not finished reached their planned {unit}: used")
    return replace(runs, table=table, notes=notes, warnings=[*runs.warnings, *_stale(runs, table)])


def _with_status(table: pd.DataFrame) -> pd.DataFrame:
    table = table.copy()
    if "status" not in table:
        table["status"] = "done"
    if "message" not in table:
        table["message"] = ""
    table["message"] = table["message"].fillna("").astype(str)
    return table


def _share_of_plan(runs: RunTable) -> tuple[pd.Series, pd.Series, pd.Series, str]:
    """Reached / planned for each run, both, and their unit; steps if they are known, or tokens."""
    table = runs.table
    reached = reached_steps(runs)[0]
    planned, plans = planned_steps(runs)
    if plans and (reached / planned).notna().any():
        return reached / planned, reached, planned, "steps"
    names = find_names(table.columns, (PLANNED_TOKENS, *TOKEN_PLAN_NAMES))
    names = [name for name in names if name not in runs.history]
    seen = [name for name in find_names(table.columns, USUAL_NAMES["tokens"]) if name not in names]
    seen = [name for name in seen if not runs.origin_known or name in runs.history]
    counted = find_names(seen, COUNTED_TOKENS)
    if not names and not runs.origin_known and counted and len(seen) > len(counted):
        names = [name for name in seen if name not in counted]  # `tokens` beside `tokens_seen`
        seen = counted
    reached, planned = first_of(table, seen)[0], first_of(table, names)[0]
    if (reached / planned).notna().any():
        return reached / planned, reached, planned, "tokens"
    reached, planned = _epochs(runs)
    return reached / planned, reached, planned, "epochs"


def _epochs(runs: RunTable) -> tuple[pd.Series, pd.Series]:
    """The epochs that each run made, and those it was to make; a count may start at 0."""
    reached = first_of(runs.table, find_names(runs.table.columns, EPOCHS))[0]
    planned = first_of(runs.table, find_names(runs.table.columns, EPOCH_PLANS))[0]
    if (reached.dropna() % 1 == 0).all():
        reached = reached + 1
    known = (
        reached / planned >= FINISHED_SHARE
    ).mean() >= 0.5  # else the plan may be in other units
    return (reached if known else reached * float("nan")), planned


def _with_planned_tokens(table: pd.DataFrame, short: pd.Series, share: pd.Series) -> pd.DataFrame:
    """Gives an unfinished run its planned tokens, so that it belongs to the setting of its plan."""
    if REACHED_TOKENS not in table or not short.any():
        return table
    planned = numbers(table, REACHED_TOKENS) / share
    return table.assign(tokens=table["tokens"].where(~short | planned.isna(), planned))


def _shortfall(reached: pd.Series, planned: pd.Series, unit: str) -> list[str]:
    return [
        f"unfinished: {human(a)} of {human(b)} {unit}" if a == a and b == b else ""
        for a, b in zip(reached, planned, strict=True)
    ]


def _schedule_ended(runs: RunTable) -> pd.Series:
    """Whether the lr had decayed, or never decays, when a run stopped."""
    table, reached = runs.table, reached_steps(runs)[0]
    end = first_of(table, find_names(table.columns, SCHEDULE_END_NAMES))[0]
    ended = (reached >= FINISHED_SHARE * end).fillna(False)
    for name in find_names(table.columns, SCHEDULES):
        ended |= table[name].astype(str).str.lower().isin(CONSTANT)
    for name in find_names(table.columns, ("decay_lr",)):
        ended |= table[name].astype(str).str.lower().isin(("false", "0", "0.0"))
    return ended


def _stale(runs: RunTable, table: pd.DataFrame) -> list[str]:
    """A warning if the loss was last evaluated long before the end of the runs."""
    if STEPS not in table or "loss" not in table:
        return []
    done = table[table["status"] == "done"]
    names = [column for column in table if str(column).startswith(LAST)]
    for name in sorted(names, key=lambda column: str(column) == f"{LAST}loss"):
        metric = str(name).removeprefix(LAST)
        if metric not in table or not done[metric].equals(done["loss"]):
            continue
        share = numbers(done, str(name)) / numbers(done, STEPS)
        if (n := int((share < FINISHED_SHARE).sum())) and len(done):
            return [
                f"the loss `{metric}` of {n} of {len(done)} runs was last evaluated at"
                f" {share.min():.0%} of their steps, before the lr had decayed: evaluate at the end"
            ]
    return []


def judge_by_siblings(table: pd.DataFrame) -> pd.DataFrame:
    """Marks runs that stopped before other runs of the same size, tokens and batch size."""
    table = _with_status(table)
    table = _shorter_than_siblings(table)
    return _missing_from_grid(table) if {"n_params", "tokens", "lr"} <= set(table) else table


def _levels(values: pd.Series) -> np.ndarray:
    """Numbers of values that differ by 1 % or more; -1 for missing ones."""
    logs = np.log(values.astype(float).where(values > 0).to_numpy())
    order = np.argsort(logs, kind="stable")
    steps = np.diff(logs[order], prepend=np.nan)
    levels = np.empty(len(values), int)
    levels[order] = np.cumsum(np.nan_to_num(steps, nan=0.0) > 0.01)
    return np.where(np.isnan(logs), -1, levels)


def _group_keys(table: pd.DataFrame, columns: tuple[str, ...]) -> list[np.ndarray]:
    import pandas as pd

    present = [column for column in columns if column in table]
    return [_levels(pd.to_numeric(table[column], errors="coerce")) for column in present]


def _shorter_than_siblings(table: pd.DataFrame) -> pd.DataFrame:
    """Runs of one setting whose step counter ends before that of the others."""
    names = [name for name in (STEPS, CALLS, "_step") if name in table]
    names += find_names(table.columns, REACHED_NAMES)
    sizes = find_names(table.columns, ("batch_size", "global_batch_size", "total_batch_size"))
    keys = _group_keys(table, SCALES) + [table[name].astype(str).to_numpy() for name in sizes]
    if not {"n_params", "tokens"} <= set(table) or not names:
        return table
    steps = first_of(table, names[:1])[0]
    done = table["status"] == "done"
    longest = steps.where(done).groupby(keys).transform("max")
    short = done & (steps < _least_share(table, names[0]) * longest)
    reasons = [
        f"unfinished: it ends at step {human(a)}, where others of its size and tokens ended at"
        f" {human(b)}"
        if is_short
        else ""
        for a, b, is_short in zip(steps, longest, short, strict=True)
    ]
    table["message"] = table["message"].mask(short, reasons)
    table["status"] = table["status"].mask(short, "failed")
    return table


def _least_share(table: pd.DataFrame, counter: str) -> float:
    """The share of its siblings' steps that a finished run has.

    A count of log calls differs a little between runs that a tracker knows to be finished.
    """
    is_known = bool(find_names(table.columns, STATE_NAMES[1:]))
    return CALLS_SHORT if is_known and counter in (CALLS, "_step") else FINISHED_SHARE


def _missing_from_grid(table: pd.DataFrame) -> pd.DataFrame:
    """Runs at fewer tokens that are missing from the lr grid of their size at more tokens.

    A run that was killed looks like a run of a shorter budget. It is one of a longer budget if the
    grid there lacks its lr, and the runs at its own tokens are too few for a grid of their own.
    """
    import pandas as pd

    numbers_of = {
        name: pd.to_numeric(table[name], errors="coerce") for name in ("n_params", "tokens", "lr")
    }
    usable = (table["status"] == "done") & pd.concat(numbers_of, axis=1).notna().all(axis=1)
    if "loss" in table:
        usable &= np.isfinite(pd.to_numeric(table["loss"], errors="coerce"))
    frame = pd.DataFrame(numbers_of)[usable]
    keys = [key[usable] for key in _group_keys(table, ("n_params", "batch_tokens"))]
    killed = [row for _, group in frame.groupby(keys) for row in _killed(group)]
    rows = [row for row, _ in killed]
    longest = pd.Series([tokens for _, tokens in killed], index=rows, dtype=float)
    shares = numbers_of["tokens"][rows] / longest
    table = table.assign(tokens=table["tokens"].mask(table.index.isin(rows), longest))
    table.loc[rows, "status"] = "failed"
    table.loc[rows, "message"] = [
        f"unfinished: its tokens are {share:.0%} of those of the other learning rates of its size"
        for share in shares
    ]
    return table


MIN_GRID = 3  # learning rates that a setting needs for an optimum


def _killed(group: pd.DataFrame) -> list[tuple[Any, float]]:
    """(row, tokens of its siblings) of each run that a longer grid of the same size lacks."""
    level = _levels(group["tokens"])
    grids = {number: group[level == number] for number in np.unique(level)}
    grids = {number: runs for number, runs in grids.items() if runs["lr"].nunique() >= MIN_GRID}
    killed = []
    for number in np.unique(level):
        runs = group[level == number]
        for other in (n for n in grids if n > number):
            longer = grids[other]
            small = runs["lr"].nunique() < MIN_GRID
            if (small or _completes(runs["lr"], longer["lr"])) and not _shares(runs, longer):
                killed += [(index, float(longer["tokens"].median())) for index in runs.index]
                break
    return killed


def _shares(runs: pd.DataFrame, longer: pd.DataFrame) -> bool:
    """Whether two budgets have a learning rate in common."""
    gaps = np.abs(np.log(np.unique(runs["lr"])[:, None] / np.unique(longer["lr"])))
    return bool((gaps < 1e-3).any())


def _completes(lrs: pd.Series, others: pd.Series) -> bool:
    """Whether two sets of learning rates are together one evenly spaced grid, mixed."""
    union = np.unique(np.round(np.log(np.concatenate([lrs, others])), 6))
    steps = np.diff(union)
    mixed = lrs.min() < others.max() and others.min() < lrs.max()
    return bool(mixed and steps.max() < 1.1 * steps.min())
