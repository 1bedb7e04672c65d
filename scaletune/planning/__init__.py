"""`plan`: which proxies to train so that the target's predicted lr, batch and loss are tightest, and what they will tell.

belief.py: what is assumed. candidates.py: what could be trained. pricing.py: what it costs. designing.py: which of it. Here: a
target recipe and a budget in, a `Plan` out; saying.py: that as lines and as the study that `scaletune run` carries out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaletune import counting, recipe
from scaletune.errors import UserError, nearest
from scaletune.fitting.joint.surface import Runs
from scaletune.planning import candidates as possible
from scaletune.planning.cost import Candidates, added
from scaletune.planning.optimal_design import core, half_widths, path
from scaletune.planning.prior import Belief, first_guess, from_joint, from_priors
from scaletune.recipe import LR_FREE, Recipe
from scaletune.records import Fit

LEVEL = 0.95
MOST = 300  # runs
TROUBLE = 2e-4  # of the target's cost: what a run is taken to cost beside its own
UNITS = {"%": 0.01, "h": 3600.0, "min": 60.0, "s": 1.0}
QUANTITIES = ("lr", "batch_tokens", "loss")


@dataclass(frozen=True)
class Plan:
    """The chosen runs, and what is expected of them."""

    target: Recipe
    n_params: int  # the target's
    runs: pd.DataFrame  # width, depth, n_params, tokens, batch_tokens, lr, flops and seconds of one seed alone, and the share that is spent
    cells: list[
        dict[str, Any]
    ]  # one for each (width, tokens): its settings, cost, and what its loss would cost
    seeds: int
    warmup_tokens: int | None  # of every proxy, where horizons share trunks
    level: float
    budget: dict[str, Any]  # asked, in which unit, used
    expected: dict[str, float]  # half an interval, in logs
    doubled: dict[str, Any]  # what twice the budget would buy
    said: list[str]

    @property
    def total(self) -> dict[str, float]:
        spent, apart = _spent(self.runs, self.seeds), float(self.runs["flops"].sum() * self.seeds)
        return {"runs": len(self.runs) * self.seeds, **spent, "flops_apart": apart}

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an interval is told as the half of it in logs and as a factor."""
        scale = {"n_params": self.n_params, "tokens": self.target.budget.tokens}
        told = {"level": self.level, **{name: _told(half) for name, half in self.expected.items()}}
        doubled = self.doubled | {name: _told(self.doubled[name]) for name in QUANTITIES}
        answer = {
            "target": {"name": self.target.name, "width": self.target.model.width, **scale},
            "budget": self.budget,
            "total": self.total,
        }
        return answer | {
            "seeds": self.seeds,
            "expected": told,
            "doubled": doubled,
            "cells": self.cells,
            "assumptions": self.said,
        }


def _spent(runs: pd.DataFrame, seeds: int) -> dict[str, float]:
    """FLOPs and hours of runs, a trunk's with the longest horizon it serves."""
    return {
        "flops": float((runs["flops"] * runs["share"]).sum() * seeds),
        "hours": float((runs["seconds"] * runs["share"]).sum() * seeds / 3600),
    }


def _told(half: float) -> dict[str, float]:
    return {"half_width": half, "factor": math.exp(min(half, 700.0))}


def plan(
    target: Recipe | str | Path, budget: str = "5%", *, noise: float | None = None, fit: Fit | str | Path | None = None,
    level: float = LEVEL, seeds: int = 1, flops_per_second: float | None = None, vocab_size: int = counting.BYTES_TEXT_VOCAB,
) -> Plan:  # fmt: skip
    """The study for `target` that predicts it best within `budget`: "5%" of the target's FLOPs, FLOPs ("1e18") or hours ("2h").

    `noise`: sd of ln loss of one run. `fit`: an earlier joint fit, for where to look. `flops_per_second`: what a run's hours are guessed by.
    """
    target = target if isinstance(target, Recipe) else recipe.load(target)
    _require(level=level, seeds=seeds, flops_per_second=flops_per_second)
    if target.optimizer.family in LR_FREE:
        raise UserError(
            f"a plan is for a learning rate to be found, but `optimizer.family` {target.optimizer.family!r} finds its own"
        )
    asked, whole = _asked(target, budget, vocab_size, flops_per_second)
    until, cost = asked["amount"], asked["unit"]
    n_params = counting.params(target.model, vocab_size)["n_params"]
    belief, table = _possible(target, vocab_size, fit, noise)
    table = possible.costs(target, table, vocab_size, flops_per_second)
    found = _candidates(table, belief, (n_params, target.budget.tokens), seeds, cost)
    _require_room(found, until, cost, whole)
    far = path(belief, found, until=2 * until, most=2 * MOST, trouble=TROUBLE * whole)
    within = far[np.cumsum(added(found, far)) <= until]
    chosen = within[:MOST]
    half, without = half_widths(belief, found, chosen, level)
    runs = _shared(table.loc[np.sort(chosen)])
    warmup = possible.warmup_tokens(target, int(runs["tokens"].min()), int(runs["tokens"].max()))
    full = (
        [f"no more than {MOST} points are planned: the rest of the budget is left"]
        if len(within) > MOST
        else []
    )
    return Plan(
        target, n_params, runs.reset_index(drop=True), _cells(runs, without / half, seeds), seeds, warmup, level,
        asked | {"used": float(added(found, chosen).sum())}, _named(half), _doubled(belief, found, far, level),
        [*belief.said, *_assumptions(target, belief, warmup), *full],
    )  # fmt: skip


def _shared(runs: pd.DataFrame) -> pd.DataFrame:
    """With `share`, of its own cost what each spends: all of it, but the cooldown alone where a longer one has the trunk."""
    longest = runs.groupby("trunk")["tokens"].transform("max")
    return runs.assign(share=1 - runs["stable"].where(runs["tokens"] < longest, 0.0))


def _asked(
    target: Recipe, budget: str, vocab_size: int, flops_per_second: float | None
) -> tuple[dict[str, Any], float]:
    """The budget in FLOPs or seconds, and what the target itself costs in that unit."""
    amount, unit = parse_budget(budget)
    own = {
        "width": target.model.width,
        "depth": target.model.depth,
        "tokens": target.budget.tokens,
        "batch_tokens": target.budget.batch_tokens,
    }
    whole = possible.costs(target, pd.DataFrame([own]), vocab_size, flops_per_second).iloc[0]
    cost = "seconds" if unit == "seconds" else "flops"
    amount *= float(whole["flops"]) if unit == "share" else 1.0
    return {
        "asked": budget,
        "unit": cost,
        "amount": amount,
        "of_target": amount / float(whole[cost]),
    }, float(whole[cost])


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
            f"a budget must be a share of the target such as 5%, FLOPs such as 1e18 or hours such as 2h, but got {text!r}"
        )
    if unit and unit not in UNITS:
        raise UserError(
            f"a budget must be in %, h, min or s, or FLOPs with no unit, but got {text!r}{nearest(unit, UNITS)}"
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
    target: Recipe, vocab_size: int, fit: Fit | str | Path | None, noise: float | None
) -> tuple[Belief, pd.DataFrame]:
    """What is believed about the middle of the proxies, and every run that could be trained."""
    cells = possible.scales(target, vocab_size)
    if not len(cells):
        raise UserError(
            f"no proxy has tokens per parameter within a factor of {possible.OFF_RATIO} of the target's"
        )
    centre = (float(np.log(cells["n_params"]).mean()), float(np.log(cells["tokens"]).mean()))
    if fit is not None:
        belief = from_joint(fit if isinstance(fit, Fit) else Fit.read(fit), centre, noise)
    else:
        width = int(cells["width"].iloc[(np.log(cells["n_params"]) - centre[0]).abs().argmin()])
        belief = from_priors(
            centre, *first_guess(target, math.exp(centre[0]), math.exp(centre[1]), width), noise
        )
    return belief, possible.settings(target, cells, belief.optimum)


def _candidates(
    table: pd.DataFrame, belief: Belief, scale: tuple[float, float], seeds: int, cost: str
) -> Candidates:
    n, d, x = possible.logs(table, belief.centre)
    target = (math.log(scale[0]) - belief.centre[0], math.log(scale[1]) - belief.centre[1])
    runs, each = (
        Runs(n, d, x, np.zeros(len(n)), table["cell"].to_numpy(int)),
        seeds * table[cost].to_numpy(float),
    )
    return Candidates(
        runs,
        each,
        target,
        seeds,
        table["trunk"].to_numpy(int),
        each * table["stable"].to_numpy(float),
    )


def _require_room(found: Candidates, until: float, cost: str, whole: float) -> None:
    """UserError unless the smallest identifiable study can be paid."""
    least = core(found)
    if not len(least):
        raise UserError(
            "no three proxy sizes at one horizon, with three horizons of one size, are left: give the target more width or tokens"
        )
    price = float(added(found, least).sum())
    if price > until:
        amount, asked = (
            (f"{price / 3600:.3g}h", f"{until / 3600:.3g}h")
            if cost == "seconds"
            else (f"{price:.3g} FLOPs ({price / whole:.2%} of the target)", f"{until:.3g}")
        )
        raise UserError(
            f"the smallest study that can tell the exponents costs {amount}, but the budget is {asked}"
        )


def _cells(runs: pd.DataFrame, widening: np.ndarray, seeds: int) -> list[dict[str, Any]]:
    """One row a (width, tokens): its batches with their lr, its cost, and by what factor each interval widens without it."""
    rows = []
    for (_, part), factors in zip(runs.groupby("cell"), widening, strict=True):
        first, batches = part.iloc[0], part.groupby("batch_tokens")
        rows.append({
            **{name: int(first[name]) for name in ("width", "depth", "n_params", "tokens")},
            "settings": [{"batch_tokens": int(each["batch_tokens"].iloc[0]), "lr": sorted(map(float, each["lr"]))} for _, each in batches],
            "runs": len(part) * seeds, **_spent(part, seeds),
            "without": _named(factors),
        })  # fmt: skip
    return rows


def _doubled(belief: Belief, found: Candidates, far: np.ndarray, level: float) -> dict[str, Any]:
    return {
        "runs": len(far) * found.seeds,
        "used": float(added(found, far).sum()),
        **_named(half_widths(belief, found, far, level)[0]),
    }


def _assumptions(target: Recipe, belief: Belief, warmup: int | None) -> list[str]:
    s = belief.scales
    p = target.parametrization
    said = [
        f"noise of a run {s.noise:.2g}, cells off the law by sd {s.scatter[0]:.2g} in ln lr, {s.scatter[1]:.2g} in ln batch, {s.scatter[2]:.2g} in ln loss",
        "intervals are those of a joint fit of these runs alone, and hold the target's optimum at their level over all that is believed of the law",
        "the law holds from the smallest proxy to the target: that no plan can know",
    ]
    if warmup:
        said += [
            f"proxies warm up over {warmup:,} tokens at every horizon, so that they share trunks, the target as it says: taken to make no"
            " difference (`engine.branch = false` plans without)"
        ]
    proxy = possible.depth_of(target)
    rule = f"the rule depth**-{p.depth_alpha:g}" if p.depth_alpha else "no rule"
    return said + (
        [f"proxies have depth {proxy}, the target {target.model.depth}: {rule} is taken to hold"]
        if proxy != target.model.depth
        else []
    )
