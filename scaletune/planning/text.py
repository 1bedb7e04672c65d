"""A plan as lines for people, and as the study that `scaletune run`, `sweep` and `count` carry out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletune.planning import Plan
from scaletune.planning.candidates import bare
from scaletune.recipe import with_settings

PATHS = ("source", "tokenizer")  # of `data`: what is relative to the file that names it


def times(half: float) -> str:
    """A half interval in logs as a factor."""
    return f"x/÷ {math.exp(half):.3g}" if half < math.log(1e4) else "unknown"


def interval(half: Mapping[str, float]) -> str:
    return f"lr within {times(half['lr'])}, batch {times(half['batch_tokens'])}, loss ±{math.expm1(half['loss']):.2%}"


def lines(plan: Plan) -> list[str]:
    """The table of cells, the totals, what they will tell, what twice the budget would, what is assumed."""
    total, budget, doubled = plan.total, plan.budget, plan.doubled
    share = f"{budget['used'] / budget['amount']:.0%} of the budget, {budget['used'] * budget['of_target'] / budget['amount']:.2%} of the target's cost"
    head = f"{'width':>6} {'depth':>5} {'n_params':>11} {'tokens':>13} {'runs':>5} {'FLOPs':>8} {'hours':>8}  {'without it: lr batch loss':28} batch_tokens: lr"
    return [
        head,
        *(_row(cell) for cell in plan.cells),
        f"{total['runs']} runs ({plan.seeds} each point), {total['flops']:.3g} FLOPs, about {total['hours']:.3g} hours (a guess): {share}",
        *_saved(plan),
        f"expected at the target ({plan.n_params:,} parameters, {plan.target.budget.tokens:,} tokens), level {plan.level:g}: {interval(plan.expected)}",
        f"twice the budget ({doubled['runs']} runs): {interval({name: doubled[name] for name in plan.expected})}",
        *(f"! {said}" for said in plan.said),
    ]


def _saved(plan: Plan) -> list[str]:
    """What trunks that serve several horizons save."""
    spent, apart = plan.total["flops"], plan.total["flops_apart"]
    n = int((plan.runs["share"] < 1).sum()) * plan.seeds
    return [
        f"{n} of them branch off the trunk of a longer horizon: each by itself they would be {apart:.3g} FLOPs ({1 - spent / apart:.0%} saved)"
    ] * (n > 0)


def _row(cell: Mapping[str, Any]) -> str:
    """`without it` is by what factor the intervals (in logs) widen when the cell is dropped."""
    widens = " ".join(f"x{value:.3f}" for value in cell["without"].values())
    own = "; ".join(
        f"{each['batch_tokens']}: {' '.join(f'{lr:.3g}' for lr in each['lr'])}"
        for each in cell["settings"]
    )
    return (
        f"{cell['width']:6} {cell['depth']:5} {cell['n_params']:11,} {cell['tokens']:13,} {cell['runs']:5} {cell['flops']:8.2e}"
        f" {cell['hours']:8.2g}  {widens:28} {own}"
    )


def study(
    plan: Plan, folder: str | Path, target: str | Path | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what all runs share, the cells) of the study, as plain values; paths are relative to `folder`, where it will lie."""
    cells = [
        {"width": cell["width"], "depth": cell["depth"], "tokens": cell["tokens"], **each}
        for cell in plan.cells
        for each in cell["settings"]
    ]
    first = with_settings(
        bare(plan.target) if plan.warmup_tokens else plan.target,
        {name: value for name, value in cells[0].items() if name != "lr"},
    )
    data = {
        name: _beside(value, Path(folder)) if name in PATHS else value
        for name, value in first.point()["data"].items()
    }
    shared = first.point() | {
        "data": data,
        "engine": plan.target.engine.model_dump(exclude_defaults=True),
        "fit": {"law": "joint"},
    }
    if plan.warmup_tokens:
        shared["schedule"] |= {"warmup_tokens": plan.warmup_tokens}
    if plan.seeds > 1:
        shared["axes"] = {"seed": list(range(plan.target.seed, plan.target.seed + plan.seeds))}
    return ({"target": _beside(str(target), Path(folder))} if target else {}) | shared, cells


def _beside(path: str | None, folder: Path) -> str | None:
    return os.path.relpath(path, folder) if path and Path(path).exists() else path
