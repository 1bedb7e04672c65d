"""The proxies a study could train for a target: sizes below it, horizons below its own, batches and lr about the believed optimum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from scaletune import counting
from scaletune.counting import branches as branches_module
from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolved, with_settings
from scaletune.zoo import Blocks, ResNet

WIDTHS = [2 ** (-k / 2) for k in range(2, 13)]  # of the target's: half of it and less
HORIZONS = [2.0**-k for k in range(1, 9)]  # of the target's tokens
BATCHES = [4.0**k for k in (-1, -0.5, 0, 0.5, 1)]  # of the believed optimum
RATES = [2.0**k for k in range(-3, 4)]
LEAST_STEPS = 32  # of a run: fewer are all warmup
OFF_RATIO = 32  # tokens per parameter of a proxy, at most so many times the target's or less than it: a law is not asked of other regimes
LEAST_LEVELS = 3  # of sizes and of horizons: two ends, and one to check the law by


def unit(target: Recipe) -> int:
    """What a width is a multiple of."""
    model = target.model
    return (
        model.head_dim
        if isinstance(model, Blocks)
        else model.groups
        if isinstance(model, ResNet)
        else 1
    )


def widths(target: Recipe) -> list[int]:
    """Proxy widths, ascending; UserError when the target is too small to have three."""
    whole, step = target.model.width, unit(target)
    wanted = {max(round(share * whole / step), 1) * step for share in WIDTHS}
    found = [width for width in sorted(wanted) if 2 * width <= whole and _valid(target, width)]
    if len(found) < LEAST_LEVELS:
        raise UserError(
            f"a target must leave room for {LEAST_LEVELS} proxy widths of at most half its own, in multiples of {step}, but got "
            f"width={whole}, which has {'none' if not found else 'only ' + ', '.join(map(str, found))}"
        )
    return found


def _valid(target: Recipe, width: int) -> bool:
    try:
        with_settings(target, {"width": width, "depth": depth_of(target)})
    except UserError:
        return False
    return True


def depth_of(target: Recipe) -> int:
    """Depth of every proxy: the base depth where a depth rule takes it to the target's, else the target's own."""
    p = target.parametrization
    return p.base_depth if p.depth_alpha and p.base_depth else target.model.depth


def scales(target: Recipe, vocab_size: int) -> pd.DataFrame:
    """One row a cell: width, depth, n_params, tokens (nominal: a run's are whole steps)."""
    whole, own = counting.params(target.model, vocab_size)["n_params"], target.budget.tokens
    rows = []
    for width in widths(target):
        model = with_settings(target, {"width": width, "depth": depth_of(target)}).model
        n_params = counting.params(model, vocab_size)["n_params"]
        ratios = {share: own * share / n_params / (own / whole) for share in HORIZONS}
        rows += [
            {"width": width, "depth": model.depth, "n_params": n_params, "tokens": own * share}
            for share, ratio in ratios.items()
            if 1 / OFF_RATIO <= ratio <= OFF_RATIO
        ]
    return pd.DataFrame(rows)


def settings(
    target: Recipe, cells: pd.DataFrame, optimum: Callable[[float, float], tuple[float, float]]
) -> pd.DataFrame:
    """One row a run that could be trained, sorted by cell: the cells' columns, `cell`, batch_tokens, lr, and tokens in whole steps.

    `optimum(n_params, tokens)` is the believed (ln lr, ln batch_tokens). Batches are `quantum` times powers of 2, lr has 3 digits.
    """
    quantum = target.data.seq_len * target.engine.processes * target.engine.accumulation
    rows: list[dict[str, Any]] = []
    for row in _rows(cells):
        lr, batch = map(math.exp, optimum(row["n_params"], row["tokens"]))
        batches = {
            quantum * 2 ** max(round(math.log2(batch * share / quantum)), 0) for share in BATCHES
        }
        fitting = sorted(b for b in batches if b * LEAST_STEPS <= row["tokens"])
        if len(fitting) < LEAST_LEVELS:
            continue
        tokens = max(round(row["tokens"] / fitting[-1]), 1) * fitting[-1]
        n_cell = rows[-1]["cell"] + 1 if rows else 0
        rows += [
            row | {"cell": n_cell, "tokens": tokens, "batch_tokens": b, "lr": r}
            for b, r in itertools.product(fitting, _rates(lr))
        ]
    if not rows:
        raise UserError(
            f"a proxy needs at least {LEAST_STEPS} steps of three batch sizes about the believed best, which the target's tokens={target.budget.tokens} "
            "leave no room for"
        )
    return pd.DataFrame(rows)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        dict(zip(table.columns, row, strict=True))
        for row in zip(*(table[c].tolist() for c in table.columns), strict=True)
    ]


def _rates(lr: float) -> Iterator[float]:
    """Powers of 2, so that cells share them, about `lr`."""
    middle = 2.0 ** round(math.log2(lr))
    return (float(f"{middle * share:.4g}") for share in RATES)


def costs(
    target: Recipe, runs: pd.DataFrame, vocab_size: int, flops_per_second: float | None = None
) -> pd.DataFrame:
    """`runs` with flops and (guessed) seconds of one seed alone, `trunk`, alike for horizons of one trial, and `stable`, the share it serves them."""
    target, branches = bare(target), branches_module.apart(bare(target)) == ""
    rate = {} if flops_per_second is None else {"flops_per_second": flops_per_second}
    each = runs.drop_duplicates(["width", "tokens", "batch_tokens"])[
        ["width", "depth", "tokens", "batch_tokens"]
    ]
    points = [with_settings(target, row) for row in _rows(each)]
    found = each.assign(
        flops=[
            counting.flops_per_token(p.model, vocab_size, p.data.seq_len) * p.budget.tokens
            for p in points
        ],
        seconds=[counting.seconds(p, vocab_size, **rate) for p in points],
        stable=[
            branches_module.branch_step(p) / p.budget.steps if branches else 0.0 for p in points
        ],
    )
    made = runs.merge(found, on=list(each.columns), how="left", sort=False)
    trial = ["width", "depth", "batch_tokens", *(["lr"] if "lr" in runs else [])]
    return made.assign(trunk=made.groupby(trial).ngroup())


def bare(target: Recipe) -> Recipe:
    """The target without a warmup, which a proxy has its own of where trunks are shared."""
    free = {"warmup": 0.0, "warmup_tokens": None} if target.engine.branch is not False else {}
    return target.model_copy(update={"schedule": target.schedule.model_copy(update=free)})


def warmup_tokens(target: Recipe, shortest: int, longest: int) -> int | None:
    """One warmup for horizons that share trunks: the target's share of the middle one, at most half the shortest's stable phase.

    None where they share none.
    """
    own = resolved(target.schedule, target.budget)
    if target.engine.branch is False or branches_module.apart(bare(target)) or not own.warmup:
        return None
    stable = 1 - own.decay if own.kind == "wsd" else 1.0
    return max(1, round(min(own.warmup * math.sqrt(shortest * longest), stable * shortest / 2)))


def logs(
    runs: pd.DataFrame, centre: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n, d about the centre, and ln lr, ln batch_tokens."""
    return (
        np.log(runs["n_params"].to_numpy(float)) - centre[0],
        np.log(runs["tokens"].to_numpy(float)) - centre[1],
        np.log(runs[["lr", "batch_tokens"]].to_numpy(float)),
    )
