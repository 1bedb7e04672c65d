"""Resamples of runs as row weights, so that all refits are one batched solve; and which rows are checkpoints of one run."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from numpy.typing import NDArray

CHECKPOINT = re.compile(
    r"[\W_]*(?:step|steps|ckpt|checkpoint|iter|iteration)[\W_]*\d+\D{0,3}$", re.IGNORECASE
)
NAMED = (
    "cluster",
    "run",
    "run_name",
    "run_id",
)  # columns that say which run a row is of, when they repeat
SETTING = (
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
EVEN = 6  # token counts at even steps, from the first step on, from which rows of one setting are taken for one trajectory

Array = NDArray[np.float64]
Index = NDArray[np.intp]


def clusters(table: pd.DataFrame) -> tuple[Index, str]:
    """The run (numbered) that each row is of, and a sentence when rows are checkpoints of one run; each its own otherwise."""
    alone = np.arange(len(table), dtype=np.intp)
    for number, how in (_by_name(table), _by_id(table), _by_trajectory(table)):
        if number is not None:
            runs = len(set(number.tolist()))
            said = f"{len(table)} rows are checkpoints of {runs} runs ({how}): they deviate together, so runs are resampled, not rows"
            return number, said
    return alone, ""


def _number(keys: pd.Series) -> Index:
    return keys.groupby(keys, sort=False).ngroup().to_numpy().astype(np.intp)


def _by_name(table: pd.DataFrame) -> tuple[Index | None, str]:
    for column in NAMED:
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
    """Rows of one setting whose token counts are multiples of one step: horizons are chosen further and further apart."""
    settings = [column for column in SETTING if column in table]
    number = table.groupby(settings, dropna=False, sort=False).ngroup().to_numpy(np.intp)
    long = np.bincount(number)[number] >= EVEN
    trajectories = [
        k for k in np.unique(number[long]) if _even(table["tokens"].to_numpy(float)[number == k])
    ]
    if not trajectories:
        return None, ""
    even = np.isin(number, trajectories)
    alone = number.max() + 1 + np.arange(len(table))
    return _number(
        pd.Series(np.where(even, number, alone))
    ), "their token counts are even steps of one trajectory"


def _even(tokens: Array) -> bool:
    steps = np.diff(np.sort(tokens))
    return bool(steps.min() > 0) and bool(np.ptp(steps) < 0.02 * steps.mean())


def pairs(rng: np.random.Generator, n: int, cluster: Index) -> Array:
    """Counts (n, R) of rows drawn with replacement, whole clusters at a time."""
    number = int(cluster.max()) + 1
    return rng.multinomial(number, np.full(number, 1 / number), size=n).astype(float)[:, cluster]


def blocks(rng: np.random.Generator, n: int, cluster: Index, tokens: Array, length: int) -> Array:
    """Counts (n, R) of moving blocks of `length` checkpoints, drawn within each run and round its ends (circular; Politis & Romano 1992)."""
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
    """ln losses (n, R) drawn about the law: noise of rows, and of clusters where rows share theirs; as uncertain as `dof` leaves it (0: known)."""
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
