"""Plans a study: which proxies to train to predict the target's lr, batch size and loss best.

| module | contents |
|---|---|
| `prior` | the prior of the joint surface, from published laws or an earlier fit |
| `candidates` | the runs that could be trained |
| `cost` | what they cost, with shared trunks |
| `optimal_design` | which of them to train: a greedy Bayesian design |
| `text` | a plan as lines, and as a study for `scaletune run` |
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaletune import counting
from scaletune.counting.point_sizes import Measure
from scaletune.errors import UserError, nearest
from scaletune.planning import candidates as possible
from scaletune.planning.cost import Candidates, added
from scaletune.planning.optimal_design import core, half_widths, path
from scaletune.planning.point_cost import CostOf, PointCost, cost_function
from scaletune.planning.prior import first_guess, from_joint, from_priors
from scaletune.recipe import LR_FREE, Recipe
from scaletune.recipe.resolve import resolve_recipe
from scaletune.records import Fit
from scaletune.surface.model import SurfaceRuns
from scaletune.surface.prior import SurfaceDistribution

LEVEL = 0.95
MOST = 300
"""Largest number of points of a plan."""
OVERHEAD = 2e-4
"""Cost added to that of each run, as a share of the target's."""
FEWEST_FLOPS = 1e6
"""A smaller budget without a unit is a forgotten unit."""
UNITS = {"%": 0.01, "h": 3600.0, "min": 60.0, "s": 1.0}
QUANTITIES = ("lr", "batch_tokens", "loss")


@dataclass(frozen=True)
class StudyPlan:
    """The chosen runs, and how well they are expected to predict the target."""

    target: Recipe
    """The recipe that the study is for."""

    n_params: int
    """Non-embedding parameters of the target."""

    runs: pd.DataFrame
    """One row per point: width, depth, n_params, tokens, batch_tokens, lr; flops and seconds of one
    seed trained alone; `share`, the part of that cost which is spent with shared trunks."""

    cells: list[dict[str, Any]]
    """One row per setting (width, tokens): its batch sizes and lrs, its cost, and by what factor
    each interval widens without it."""

    seeds: int
    """Runs per point."""

    warmup_tokens: int | None
    """Warmup of every proxy if token budgets share trunks, else None."""

    level: float
    """Coverage of the intervals."""

    budget: dict[str, Any]
    """`asked` (text), `unit`, `amount` and `used` in that unit, `of_target` (share of its cost)."""

    expected: dict[str, float]
    """Half the expected interval of lr, batch_tokens and loss at the target, in logs."""

    doubled: dict[str, Any]
    """The same with twice the budget, and its number of runs and cost."""

    notes: list[str]
    """Assumptions, one sentence each."""

    @property
    def total(self) -> dict[str, float]:
        """Runs, FLOPs and hours of the study; `flops_apart`: FLOPs without shared trunks."""
        apart = float(self.runs["flops"].sum() * self.seeds)
        n_runs = len(self.runs) * self.seeds
        return {"runs": n_runs, **_spent(self.runs, self.seeds), "flops_apart": apart}

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an interval is given as its half in logs and as a factor."""
        return {
            "target": {
                "name": self.target.name,
                "width": self.target.model.width,
                "n_params": self.n_params,
                "tokens": self.target.budget.tokens,
            },
            "budget": self.budget,
            "total": self.total,
            "seeds": self.seeds,
            "expected": {"level": self.level}
            | {name: _interval(half) for name, half in self.expected.items()},
            "doubled": self.doubled | {name: _interval(self.doubled[name]) for name in QUANTITIES},
            "cells": self.cells,
            "assumptions": self.notes,
        }


def _spent(runs: pd.DataFrame, seeds: int) -> dict[str, float]:
    """FLOPs and hours of runs; a trunk counts with the longest run that it serves."""
    return {
        "flops": float((runs["flops"] * runs["share"]).sum() * seeds),
        "hours": float((runs["seconds"] * runs["share"]).sum() * seeds / 3600),
    }


def _interval(half: float) -> dict[str, float]:
    return {"half_width": half, "factor": math.exp(min(half, 700.0))}


def plan(
    target: Recipe | str | Path,
    budget: str = "5%",
    *,
    noise: float | None = None,
    fit: Fit | str | Path | None = None,
    level: float = LEVEL,
    seeds: int = 1,
    flops_per_second: float | None = None,
    vocab_size: int = counting.BYTES_TEXT_VOCAB,
    sizes: Measure | None = None,
) -> StudyPlan:
    """Plans the study that predicts a target best within a budget.

    The runs are chosen one by one so that each decreases the expected error of the lr, batch size
    and loss that a joint fit predicts for the target most per cost (Bayesian V-optimal design). No
    model is trained.

    Args:
        target: The recipe of the target, or its path.
        budget: A share of the target's FLOPs ("5%"), FLOPs ("1e18") or hours ("2h").
        noise: Standard deviation of ln loss between equal runs. Default: that of `fit`, or 0.001.
        fit: An earlier fit of law `joint`, or its path: where the optimum is expected.
        level: Coverage of the expected intervals.
        seeds: Runs per point.
        flops_per_second: Speed from which hours are estimated. Default: 6e10, one laptop core.
        vocab_size: Number of tokens of the vocabulary.
        sizes: Measures a model that is not in the zoo at every width, for example
            `scaletune.sweeping.sizes.point_sizes`, which asks `trainer.describe`.

    Returns:
        The plan. `scaletune plan --out STUDY.toml` writes it as a study for `scaletune run`.

    Raises:
        UserError: The budget is too small for any identifiable study, or the target leaves no room
            for smaller proxies.

    Example:
        >>> import scaletune as st
        >>> from scaletune.recipe import validate_recipe
        >>> target = validate_recipe(
        ...     {
        ...         "model": {"width": 256, "depth": 2, "head_dim": 32},
        ...         "parametrization": {"base_width": 64},
        ...         "budget": {"tokens": 2**22, "batch_tokens": 4096},
        ...     },
        ...     "small",
        ... )
        >>> plan = st.plan(target, "2%")
        >>> bool((plan.runs["width"] <= 128).all())
        True
        >>> plan.total["flops"] <= plan.budget["amount"]
        True
        >>> list(plan.expected)
        ['lr', 'batch_tokens', 'loss']
    """
    target = resolve_recipe(target)
    _require(level=level, seeds=seeds, flops_per_second=flops_per_second)
    if target.optimizer.family in LR_FREE:
        raise UserError(
            "a plan is for an optimizer with a learning rate, but `optimizer.family`"
            f" {target.optimizer.family!r} has none to tune"
        )
    if not target.has_budget:
        raise UserError(
            "a plan needs `budget.tokens` and `budget.batch_tokens` of the target, but it has none"
        )
    cost = cost_function(target, vocab_size, flops_per_second, sizes)
    whole = cost(target)
    limit, target_cost = _budget(whole, budget)
    until, unit = limit["amount"], limit["unit"]
    n_params = whole.n_params
    prior, table, source = _possible(target, cost, fit, noise)
    table = possible.costs(target, table, cost)
    candidates = _candidates(table, prior, (n_params, target.budget.tokens), seeds, unit)
    _require_room(candidates, until, unit, target_cost)
    doubled = path(
        prior, candidates, until=2 * until, most=2 * MOST, overhead=OVERHEAD * target_cost
    )
    within = doubled[np.cumsum(added(candidates, doubled)) <= until]
    chosen = within[:MOST]
    half, without = half_widths(prior, candidates, chosen, level)
    runs = _shared(table.loc[np.sort(chosen)])
    warmup = possible.warmup_tokens(target, int(runs["tokens"].min()), int(runs["tokens"].max()))
    notes = [source, *_assumptions(target, prior, warmup)]
    if len(within) > MOST:
        notes.append(f"a plan has at most {MOST} points: the rest of the budget is not used")
    return StudyPlan(
        target=target,
        n_params=n_params,
        runs=runs.reset_index(drop=True),
        cells=_cells(runs, without / half, seeds),
        seeds=seeds,
        warmup_tokens=warmup,
        level=level,
        budget=limit | {"used": float(added(candidates, chosen).sum())},
        expected=_named(half),
        doubled=_doubled(prior, candidates, doubled, level),
        notes=notes,
    )


def _shared(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds `share`, the part of its cost that each run spends.

    That is all of it, or only the cooldown if a longer run has the same trunk.
    """
    longest = runs.groupby("trunk")["tokens"].transform("max")
    return runs.assign(share=1 - runs["stable"].where(runs["tokens"] < longest, 0.0))


def _budget(target: PointCost, budget: str) -> tuple[dict[str, Any], float]:
    """The budget in FLOPs or seconds, and the cost of the target in that unit."""
    amount, unit = parse_budget(budget)
    cost = "seconds" if unit == "seconds" else "flops"
    whole = target.seconds if cost == "seconds" else target.flops
    amount *= target.flops if unit == "share" else 1.0
    limit = {"asked": budget, "unit": cost, "amount": amount, "of_target": amount / whole}
    return limit, whole


def _named(values: np.ndarray) -> dict[str, float]:
    return dict(zip(QUANTITIES, map(float, values), strict=True))


def parse_budget(text: str) -> tuple[float, str]:
    """("5%") -> (0.05, "share"); ("2h") -> (7200, "seconds"); ("1e18") -> (1e18, "flops")."""
    matched = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(\D*)", str(text))
    number, unit = (matched[1], matched[2].strip()) if matched else ("", "")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount > 0):
        raise UserError(
            "a budget must be a share of the target such as 5%, FLOPs such as 1e18 or hours such as"
            f" 2h, but got {text!r}"
        )
    if unit and unit not in UNITS:
        raise UserError(
            f"a budget must be in %, h, min or s, or FLOPs with no unit, but got {text!r}"
            f"{nearest(unit, UNITS)}"
        )
    if not unit and amount < FEWEST_FLOPS:
        raise UserError(
            f"a budget without a unit is in FLOPs, and {text} is less than one training step: write"
            f" `{text}%` for a share of the target's FLOPs, `{text}h` for hours"
        )
    if unit == "%":
        return amount * UNITS[unit], "share"
    return (amount * UNITS[unit], "seconds") if unit else (amount, "flops")


def _require(*, level: float, seeds: int, flops_per_second: float | None) -> None:
    if not 0 < level < 1:
        raise UserError(f"`0 < level < 1` must hold, but got {level!r}")
    if seeds < 1:
        raise UserError(f"`seeds` must be at least 1, but got {seeds!r}")
    if flops_per_second is not None and not (
        math.isfinite(flops_per_second) and flops_per_second > 0
    ):
        raise UserError(
            f"`flops_per_second` must be a number above 0, but got {flops_per_second!r}"
        )


def _possible(
    target: Recipe, cost: CostOf, fit: Fit | str | Path | None, noise: float | None
) -> tuple[SurfaceDistribution, pd.DataFrame, str]:
    """The prior about the middle of the proxies, every possible run, and the prior's source."""
    cells = possible.scales(target, cost)
    if not len(cells):
        raise UserError(
            "a proxy's tokens per parameter must be within a factor of"
            f" {possible.OFF_RATIO} of the target's, but no proxy's are"
        )
    centre = (float(np.log(cells["n_params"]).mean()), float(np.log(cells["tokens"]).mean()))
    if fit is not None:
        earlier = fit if isinstance(fit, Fit) else Fit.read(fit)
        prior = from_joint(earlier, centre, noise)
        source = (
            f"the optimum is expected where fit {earlier.digest} predicts it; the runs of that fit"
            " do not count as runs of the study"
        )
    else:
        width = int(cells["width"].iloc[(np.log(cells["n_params"]) - centre[0]).abs().argmin()])
        at, sds, source = first_guess(target, math.exp(centre[0]), math.exp(centre[1]), width)
        prior = from_priors(centre, at, sds, noise)
    return prior, possible.settings(target, cells, prior.optimum), source


def _candidates(
    table: pd.DataFrame,
    prior: SurfaceDistribution,
    scale: tuple[float, float],
    seeds: int,
    cost: str,
) -> Candidates:
    n, d, x = possible.logs(table, prior.centre)
    runs = SurfaceRuns(n, d, x, np.zeros(len(n)), table["cell"].to_numpy(int))
    each = seeds * table[cost].to_numpy(float)
    stable = each * table["stable"].to_numpy(float)
    trunk = table["trunk"].to_numpy(int)
    return Candidates(runs, each, prior.offset(*scale), seeds, trunk, stable)


def _require_room(candidates: Candidates, until: float, cost: str, whole: float) -> None:
    """Raises UserError if the budget does not pay for the smallest identifiable study."""
    least = core(candidates)
    if not len(least):
        raise UserError(
            "a study needs three proxy sizes at one token budget and three token budgets of one"
            " size, but the target leaves no room for them: give it more width or tokens"
        )
    price = float(added(candidates, least).sum())
    if price > until:
        if cost == "seconds":
            needed, available = f"{price / 3600:.3g}h", f"{until / 3600:.3g}h"
        else:
            needed = f"{price:.3g} FLOPs ({price / whole:.2%} of the target)"
            available = f"{until:.3g}"
        raise UserError(
            f"the smallest study that identifies the exponents costs {needed}, but the budget is"
            f" {available}"
        )


def _cells(runs: pd.DataFrame, widening: np.ndarray, seeds: int) -> list[dict[str, Any]]:
    """One row per setting: `StudyPlan.cells`."""
    rows = []
    for (_, part), factors in zip(runs.groupby("cell"), widening, strict=True):
        first = part.iloc[0]
        batches = [
            {
                "batch_tokens": int(each["batch_tokens"].iloc[0]),
                "lr": sorted(map(float, each["lr"])),
            }
            for _, each in part.groupby("batch_tokens")
        ]
        rows.append(
            {name: int(first[name]) for name in ("width", "depth", "n_params", "tokens")}
            | {"settings": batches, "runs": len(part) * seeds, **_spent(part, seeds)}
            | {"without": _named(factors)}
        )
    return rows


def _doubled(
    prior: SurfaceDistribution, candidates: Candidates, chosen: np.ndarray, level: float
) -> dict[str, Any]:
    return {
        "runs": len(chosen) * candidates.seeds,
        "used": float(added(candidates, chosen).sum()),
        **_named(half_widths(prior, candidates, chosen, level)[0]),
    }


def _assumptions(target: Recipe, prior: SurfaceDistribution, warmup: int | None) -> list[str]:
    s, p = prior.scales, target.parametrization
    notes = [
        f"noise (sd of ln loss of one run) {s.noise:.2g}; settings scatter about the law by sd"
        f" {s.scatter[0]:.2g} in ln lr, {s.scatter[1]:.2g} in ln batch size,"
        f" {s.scatter[2]:.2g} in ln loss",
        "the intervals are those of a joint fit of these runs only, averaged over the prior",
        "the law holds from the smallest proxy to the target; no plan can test that",
    ]
    if warmup:
        notes.append(
            f"all proxies warm up over {warmup:,} tokens, so that token budgets can share trunks;"
            " the target keeps its own warmup, and the difference is neglected"
            " (`engine.branch = false` plans without shared trunks)"
        )
    if target.foreign and not target.states("data.seq_len"):
        notes.append(
            "batch sizes are the target's times powers of 2: check that your trainer takes them"
        )
    if target.foreign and not target.states("optimizer.family"):
        notes.append(
            "the optimum is expected where it is for AdamW, because the recipe does not state"
            " `optimizer.family`"
        )
    proxy = possible.depth_of(target)
    if proxy != target.model.depth:
        rule = f"the rule depth**-{p.depth_alpha:g}" if p.depth_alpha else "no rule"
        notes.append(
            f"proxies have depth {proxy} and the target {target.model.depth}: {rule} transfers lr"
        )
    return notes
