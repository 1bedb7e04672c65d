"""Resamples of runs as row weights, and the detection of rows that are checkpoints of one run.

With row weights, all refits are one batched problem.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from numpy.typing import NDArray

CHECKPOINT = re.compile(
    r"[\W_]*(?:step|steps|ckpt|checkpoint|iter|iteration)[\W_]*\d+\D{0,3}$", re.IGNORECASE
)
# Columns that identify the run of a row, if their values repeat.
RUN_COLUMNS = ("cluster", "run", "run_name", "run_id")
SETTING_COLUMNS = (
    "n_params",
    "width",
    "depth",
    "model",
    "model_name",
    "schedule",
    "train_dataset",
    "dataset",
    "lr",
    "batch_tokens",
    "weight_decay",
    "seed",
)
# Rows of one setting with at least so many evenly spaced token counts are one trajectory.
MIN_CHECKPOINTS = 6

Array = NDArray[np.float64]
Index = NDArray[np.intp]


def find_clusters(table: pd.DataFrame) -> tuple[Index, str]:
    """The number of the run of each row, and a warning if rows are checkpoints of one run."""
    for number, how in (_by_name(table), _by_id(table), _by_trajectory(table)):
        if number is not None:
            runs = len(set(number.tolist()))
            return number, (
                f"{len(table)} rows are checkpoints of {runs} runs ({how}): their errors are "
                "correlated, so whole runs are resampled"
            )
    return np.arange(len(table), dtype=np.intp), ""


def _number(keys: pd.Series) -> Index:
    return keys.groupby(keys, sort=False).ngroup().to_numpy().astype(np.intp)


def _by_name(table: pd.DataFrame) -> tuple[Index | None, str]:
    for column in RUN_COLUMNS:
        if (
            column in table
            and table[column].notna().all()
            and 1 < table[column].nunique() < len(table)
        ):
            return _number(table[column].astype(str)), f"`{column}` repeats"
    return None, ""


def _by_id(table: pd.DataFrame) -> tuple[Index | None, str]:
    for column in ("run_id", "id"):
        if column in table:
            stem = table[column].astype(str).str.replace(CHECKPOINT, "", regex=True)
            if stem.nunique() < len(table) and (stem != table[column].astype(str)).any():
                return _number(stem), f"`{column}` ends in a step"
    return None, ""


def _by_trajectory(table: pd.DataFrame) -> tuple[Index | None, str]:
    """Rows of one setting with evenly spaced token counts; chosen token budgets are not even."""
    settings = [column for column in SETTING_COLUMNS if column in table]
    number = table.groupby(settings, dropna=False, sort=False).ngroup().to_numpy(np.intp)
    long = np.bincount(number)[number] >= MIN_CHECKPOINTS
    tokens = table["tokens"].to_numpy(float)
    trajectories = [k for k in np.unique(number[long]) if _evenly_spaced(tokens[number == k])]
    if not trajectories:
        return None, ""
    in_trajectory = np.isin(number, trajectories)
    own_number = number.max() + 1 + np.arange(len(table))
    runs = pd.Series(np.where(in_trajectory, number, own_number))
    return _number(runs), "their token counts are evenly spaced steps of one trajectory"


def _evenly_spaced(tokens: Array) -> bool:
    steps = np.diff(np.sort(tokens))
    return bool(steps.min() > 0) and bool(np.ptp(steps) < 0.02 * steps.mean())


def pairs(rng: np.random.Generator, n: int, cluster: Index) -> Array:
    """Counts (n, R) of rows; whole clusters are drawn with replacement."""
    number = int(cluster.max()) + 1
    return rng.multinomial(number, np.full(number, 1 / number), size=n).astype(float)[:, cluster]


def blocks(rng: np.random.Generator, n: int, cluster: Index, tokens: Array, length: int) -> Array:
    """Counts (n, R) of rows; blocks of `length` checkpoints are drawn within each run.

    The circular block bootstrap (Politis & Romano 1992).
    """
    counts = np.zeros((n, len(cluster)))
    for number in np.unique(cluster):
        rows = np.flatnonzero(cluster == number)
        rows = rows[np.argsort(tokens[rows], kind="stable")]
        span = min(length, len(rows))
        first = rng.integers(len(rows), size=(n, -(-len(rows) // span)))
        inside = (first[..., None] + np.arange(span)).reshape(n, -1)[:, : len(rows)] % len(rows)
        np.add.at(counts, (np.arange(n)[:, None], rows[inside]), 1.0)
    return counts


def noise(
    rng: np.random.Generator,
    n: int,
    ln_model: Array,
    residuals: Array,
    sd: float,
    dof: int,
    cluster: Index,
) -> Array:
    """ln losses (n, R) drawn around the law.

    The noise has a part for each row, and a part for each cluster if rows share clusters. The sd is
    as uncertain as `dof` implies; dof = 0 means a known sd.
    """
    number = int(cluster.max()) + 1
    shared = 0.0
    if number < len(ln_model):
        means = np.bincount(cluster, residuals) / np.bincount(cluster)
        shared, dof = min(float(means.std(ddof=1)), sd), max(number - 5, 1)
    wide = np.sqrt(dof / rng.chisquare(dof, size=(n, 1))) if dof else 1.0
    own = np.sqrt(sd**2 - shared**2)
    return ln_model + wide * (
        own * rng.standard_normal((n, len(ln_model)))
        + shared * rng.standard_normal((n, number))[:, cluster]
    )
