"""Finds losses that are not in nats per token, mix two units, or rise where a loss falls."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.importing.names import VOCABULARY_NAMES, find_names

LOWEST_NATS = 1.3  # text models with fewer than 1e9 parameters and 1e11 tokens stay above it
SMALL_RUN = (1e9, 1e11)
LARGEST_VOCABULARY = 270_000  # Gemma's; its logarithm is the loss of a uniform guess
TRAINED = (1e8, 1e9)  # parameters and tokens from which text models are below TRAINED_NATS
TRAINED_NATS = 6.5
LR_JUMP = 1.35  # factor between losses at neighbouring lrs, up and down again, beyond noise
SIZE_JUMP = 1.5  # factor by which a larger run is worse; bad tuning reaches 1.41 in public sweeps
SIMILAR = 1.15  # losses on both sides of a jump
LARGER = 1.5  # factor in n_params or tokens from which the loss must fall
NOISE = 0.005
MOSTLY = 0.8  # share of pairs of settings in which the loss rises
MAX_SETTINGS = 400  # settings that are compared pairwise

Array = NDArray[np.float64]


def loss_doubts(runs: pd.DataFrame) -> list[str]:
    """Sentences about the unit of the loss.

    Args:
        runs: Finished runs with `n_params`, `tokens`, a finite `loss`, `cell` (a number per
            setting), and perhaps `lr`.
    """
    lowest = runs.loc[runs.groupby("cell")["loss"].idxmin()]
    return [
        *_unlike_nats(lowest, _log_vocabulary(runs)),
        *(_two_units(runs, lowest) or _rising(lowest)),
    ]


def _log_vocabulary(runs: pd.DataFrame) -> float:
    sizes = [
        float(size)
        for name in find_names(runs.columns, VOCABULARY_NAMES)
        if (size := pd.to_numeric(runs[name], errors="coerce").max()) > 1
    ]
    return math.log(max(sizes, default=LARGEST_VOCABULARY))


def _unlike_nats(lowest: pd.DataFrame, uniform: float) -> list[str]:
    loss, n_params, tokens = (lowest[name] for name in ("loss", "n_params", "tokens"))
    middle = float(loss.median())
    trained = (n_params >= TRAINED[0]) & (tokens >= TRAINED[1])
    small = (n_params < SMALL_RUN[0]) & (tokens < SMALL_RUN[1])
    if _is_one_example_a_token(lowest):
        return []
    if middle > uniform or (trained.any() and loss[trained].median() > TRAINED_NATS):
        return [
            f"the lowest losses, {loss.min():.3g} to {loss.max():.3g}, are too high for nats per "
            "token of a trained language model: a perplexity, a sum, or another unit; give nats "
            "per token (ln of a perplexity), otherwise the law holds in this unit only"
        ]
    if small.any() and loss[small].median() < LOWEST_NATS:
        return [
            f"the lowest losses, {loss[small].min():.3g} to {loss[small].max():.3g}, are too low "
            "for nats per token of text at these sizes: bits per byte, nats per character, an "
            "error, or another unit; the law holds in this unit only and cannot be compared with "
            "published laws"
        ]
    return []


def _is_one_example_a_token(runs: pd.DataFrame) -> bool:
    return "seq_len" in runs and bool((pd.to_numeric(runs["seq_len"], errors="coerce") == 1).all())


def _two_units(runs: pd.DataFrame, lowest: pd.DataFrame) -> list[str]:
    factor, n = LR_JUMP, _jumps_over_lr(runs) if "lr" in runs else 0
    if n < max(2, 0.02 * len(runs)):
        factor, n = SIZE_JUMP, _settings_above_smaller(lowest)
    if not n:
        return []
    return [
        f"losses of neighbouring runs differ by a factor of {factor:g} or more, up and down again, "
        f"in {n} places: check that all losses have one unit, one tokenizer and one data set"
    ]


def _jumps_over_lr(runs: pd.DataFrame) -> int:
    """Runs below the best lr that are LR_JUMP above similar losses at a lower and a higher lr.

    A loss basin has no such run, and runs diverge above the best lr.
    """
    keys = [name for name in ("cell", "batch_tokens", "weight_decay") if name in runs]
    ordered = runs.sort_values([*keys, "lr", "loss"], kind="stable").reset_index(drop=True)
    groups = ordered.groupby(keys, dropna=False, sort=False)["loss"]
    reverse = ordered.iloc[::-1].groupby(keys, dropna=False, sort=False)["loss"]
    before, after = groups.cummin(), reverse.cummin().sort_index()
    best_lr = ordered["lr"].to_numpy()[groups.transform("idxmin").to_numpy(int)]
    high = ordered["loss"] > LR_JUMP * np.maximum(before, after)
    similar = abs(np.log(before / after)) < math.log(SIMILAR)
    return int((high & similar & (ordered["lr"] < best_lr)).sum())


def _pairs(lowest: pd.DataFrame) -> tuple[Array, Array, Array]:
    """ln ratios of n_params, tokens and loss of every ordered pair of settings."""
    step = -(-len(lowest) // MAX_SETTINGS)
    few = lowest.sort_values(["n_params", "tokens"], kind="stable").iloc[::step]
    logs = (np.log(few[name].to_numpy(float)) for name in ("n_params", "tokens", "loss"))
    n, d, loss = (values[None, :] - values[:, None] for values in logs)
    return n, d, loss


def _settings_above_smaller(lowest: pd.DataFrame) -> int:
    """Settings with a loss SIZE_JUMP above that of a smaller one, if others are not above theirs.

    0 if the loss rises throughout, which is another fault than two units.
    """
    n, d, loss = _pairs(lowest)
    larger = (n >= 0) & (d >= 0) & (n + d > math.log(LARGER))
    high = larger & (loss > math.log(SIZE_JUMP))
    rising = (larger & (loss > NOISE)).sum() / max(larger.sum(), 1)
    count = int(high.any(axis=0).sum())
    return count if count >= 2 and rising < MOSTLY else 0


def _rising(lowest: pd.DataFrame) -> list[str]:
    if len(lowest) < 3 or not (lowest["loss"] > 0).all():
        return []
    n, d, loss = _pairs(lowest)
    same = math.log(1.02)
    for name, pairs in (
        ("n_params", (n > math.log(LARGER)) & (abs(d) < same)),
        ("tokens", (d > math.log(LARGER)) & (abs(n) < same)),
        ("n_params and tokens", (n > math.log(LARGER)) & (d > math.log(LARGER))),
    ):
        if pairs.sum() >= 3 and (loss[pairs] > NOISE).mean() >= MOSTLY:
            return [
                f"the lowest loss rises with {name}, over "
                f"{(loss[pairs] > NOISE).mean():.0%} of the pairs of settings: check that `loss` "
                "is a loss and not an accuracy or another score, and that larger runs were tuned "
                "and not repeated over little data"
            ]
    return []
