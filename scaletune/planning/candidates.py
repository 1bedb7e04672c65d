"""The runs that a study could train for a target.

Proxy sizes and token budgets below the target's, and batch sizes and learning rates about the
expected optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from scaletune.counting import branches as branches_module
from scaletune.errors import UserError
from scaletune.planning.point_cost import CostOf, proxy
from scaletune.recipe import Recipe, resolve_schedule
from scaletune.zoo import BlocksConfig, OwnConfig, ResNetConfig

WIDTHS = [2 ** (-k / 2) for k in range(2, 13)]
"""Shares of the target's width."""
HORIZONS = [2.0**-k for k in range(1, 9)]
"""Shares of the target's tokens."""
BATCHES = [4.0**k for k in (-1, -0.5, 0, 0.5, 1)]
"""Multiples of the expected optimal batch size."""
RATES = [2.0**k for k in range(-3, 4)]
"""Multiples of the expected optimal lr."""
LEAST_STEPS = 32
"""Shorter runs are mostly warmup."""
OFF_RATIO = 32
"""Largest factor between the tokens per parameter of a proxy and of the target: a law may not hold
over other regimes."""
OWN_PARTS = 16
"""Proxy widths of a user's model are multiples of a power of 2, about this part of its width."""
LEAST_LEVELS = 3
"""Sizes, and token budgets: two ends, and one to test the law."""


def unit(target: Recipe) -> int:
    """The number that a width is a multiple of."""
    model = target.model
    if isinstance(model, BlocksConfig):
        return model.head_dim
    if isinstance(model, OwnConfig):  # its code may split the width, into heads for example
        part = max(model.width // OWN_PARTS, 1)
        return math.gcd(model.width, 2 ** (part.bit_length() - 1))
    return model.groups if isinstance(model, ResNetConfig) else 1


def widths(target: Recipe, cost: CostOf) -> list[int]:
    """Proxy widths, ascending.

    Raises:
        UserError: The target is too small to have three.
    """
    whole, step = target.model.width, unit(target)
    wanted = {max(round(share * whole / step), 1) * step for share in WIDTHS}
    wanted = {width for width in wanted if 2 * width <= whole}
    reasons = {width: _invalid(target, width, cost) for width in sorted(wanted)}
    valid = [width for width, reason in reasons.items() if not reason]
    if len(valid) < LEAST_LEVELS:
        if isinstance(target.model, OwnConfig) and any(reasons.values()):
            raise UserError(next(filter(None, reasons.values())))
        which = f"only {', '.join(map(str, valid))}" if valid else "none"
        raise UserError(
            f"a target must leave room for {LEAST_LEVELS} proxy widths of at most half its own, in"
            f" multiples of {step}, but got width={whole}, which has {which}"
        )
    return valid


def _invalid(target: Recipe, width: int, cost: CostOf) -> str:
    """Why no proxy can have a width; empty if one can."""
    try:
        point = proxy(target, {"width": width, "depth": depth_of(target)})
        if isinstance(target.model, OwnConfig):
            cost(point)
    except UserError as error:
        return str(error)
    return ""


def depth_of(target: Recipe) -> int:
    """Depth of every proxy: the base depth if a depth rule transfers lr, else the target's."""
    p = target.parametrization
    return p.base_depth if p.depth_alpha and p.base_depth else target.model.depth


def scales(target: Recipe, cost: CostOf) -> pd.DataFrame:
    """One row per cell: width, depth, n_params, tokens (nominal; a run has whole steps)."""
    whole, own = cost(target).n_params, target.budget.tokens
    rows = []
    for width in widths(target, cost):
        point = proxy(target, {"width": width, "depth": depth_of(target)})
        model, n_params = point.model, cost(point).n_params
        ratios = {share: own * share / n_params / (own / whole) for share in HORIZONS}
        rows += [
            {"width": width, "depth": model.depth, "n_params": n_params, "tokens": own * share}
            for share, ratio in ratios.items()
            if 1 / OFF_RATIO <= ratio <= OFF_RATIO
        ]
    return pd.DataFrame(rows)


def settings(
    target: Recipe, cells: pd.DataFrame, optimum: Callable[[float, float], Iterable[float]]
) -> pd.DataFrame:
    """The runs that could be trained, sorted by cell.

    Args:
        target: The target.
        cells: From `scales`.
        optimum: (n_params, tokens) -> expected (ln lr, ln batch_tokens).

    Returns:
        The columns of `cells` with `cell` (number), batch_tokens, lr, and tokens in whole steps.
        Batch sizes are powers of 2 times the smallest one that the target's engine can train.

    Raises:
        UserError: No proxy has enough steps at three batch sizes.
    """
    quantum = _quantum(target)
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
            f"a proxy needs at least {LEAST_STEPS} steps of three batch sizes about the expected"
            f" optimum, but the target's tokens={target.budget.tokens} leave no room for that"
        )
    return pd.DataFrame(rows)


def _quantum(target: Recipe) -> int:
    """The batch size of which others are multiples: the smallest that the target's engine trains.

    What a user's trainer can train is unknown: there it is the odd part of the target's batch size.
    """
    if not target.foreign:
        return target.data.seq_len * target.engine.processes * target.engine.accumulation
    if target.states("data.seq_len"):
        return target.data.seq_len
    batch = target.budget.batch_tokens
    return batch // (batch & -batch)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        dict(zip(table.columns, row, strict=True))
        for row in zip(*(table[c].tolist() for c in table.columns), strict=True)
    ]


def _rates(lr: float) -> Iterator[float]:
    """Powers of 2 about `lr`, rounded to 4 digits, so that cells share them."""
    middle = 2.0 ** round(math.log2(lr))
    return (float(f"{middle * share:.4g}") for share in RATES)


def costs(target: Recipe, runs: pd.DataFrame, cost: CostOf) -> pd.DataFrame:
    """`runs` with columns of their cost.

    `flops` and (estimated) `seconds` of one seed trained alone; `trunk`, a number that the token
    budgets of one trial share; `stable`, the share of the cost that a longer budget includes.
    """
    target = bare(target)
    can_branch = branches_module.no_branch_reason(target) == ""
    each = runs.drop_duplicates(["width", "tokens", "batch_tokens"])[
        ["width", "depth", "tokens", "batch_tokens"]
    ]
    points = [proxy(target, row) for row in _rows(each)]
    prices = [cost(point) for point in points]
    priced = each.assign(
        flops=[price.flops for price in prices],
        seconds=[price.seconds for price in prices],
        stable=[
            branches_module.branch_step(p) / p.budget.steps if can_branch else 0.0 for p in points
        ],
    )
    table = runs.merge(priced, on=list(each.columns), how="left", sort=False)
    trial = ["width", "depth", "batch_tokens", *(["lr"] if "lr" in runs else [])]
    return table.assign(trunk=table.groupby(trial).ngroup())


def bare(target: Recipe) -> Recipe:
    """The target without its warmup, if trunks may be shared: the proxies have another one."""
    if target.foreign:
        return target
    free = {"warmup": 0.0, "warmup_tokens": None} if target.engine.branch is not False else {}
    return target.model_copy(update={"schedule": target.schedule.model_copy(update=free)})


def warmup_tokens(target: Recipe, shortest: int, longest: int) -> int | None:
    """The warmup of all proxies, if token budgets share trunks; else None.

    It is the target's share of the geometric mean budget, but at most half the stable phase of the
    shortest run.
    """
    if target.foreign:
        return None
    own = resolve_schedule(target.schedule, target.budget)
    if target.engine.branch is False or not own.warmup:
        return None
    if branches_module.no_branch_reason(bare(target)):
        return None
    stable = 1 - own.decay if own.kind == "wsd" else 1.0
    return max(1, round(min(own.warmup * math.sqrt(shortest * longest), stable * shortest / 2)))


def logs(
    runs: pd.DataFrame, centre: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n and d about the centre, and (ln lr, ln batch_tokens)."""
    return (
        np.log(runs["n_params"].to_numpy(float)) - centre[0],
        np.log(runs["tokens"].to_numpy(float)) - centre[1],
        np.log(runs[["lr", "batch_tokens"]].to_numpy(float)),
    )
