"""A plan as lines of text, and as the study that `scaletune run`, `sweep` and `count` read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletune.planning import StudyPlan
from scaletune.planning.candidates import bare
from scaletune.planning.point_cost import proxy
from scaletune.units import human
from scaletune.zoo import OwnConfig

PATHS = ("source", "tokenizer")
"""Keys of `data` that are paths relative to the file that names them."""
HEAD = (
    f"{'width':>6} {'depth':>5} {'parameters':>10} {'tokens':>7} {'runs':>5} {'FLOPs':>8}"
    f" {'hours':>8}  {'wider intervals without it':27} batch size: learning rates"
)
SECOND_HEAD = f"{'':57}{'lr':>8} {'batch':>6} {'loss':>6}"


def factor(half: float) -> str:
    """A half interval in logs as a factor."""
    return f"a factor of {math.exp(half):.3g}" if half < math.log(1e4) else "an unknown factor"


def interval(half: Mapping[str, float]) -> str:
    """Expected intervals in words; `half` holds half widths in logs."""
    loss = f"{100 * math.expm1(min(half['loss'], 700.0)):.2f} %"
    lr, batch = factor(half["lr"]), factor(half["batch_tokens"])
    return f"lr within {lr}, batch size within {batch}, loss within {loss}"


def lines(plan: StudyPlan) -> list[str]:
    """The settings, the total cost, the expected intervals and the assumptions."""
    total, budget, doubled = plan.total, plan.budget, plan.doubled
    used = 100 * budget["used"] / budget["amount"]
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds"
    more = interval({name: doubled[name] for name in plan.expected})
    return [
        f"Target: {human(plan.n_params)} parameters (non-embedding),"
        f" {human(plan.target.budget.tokens)} tokens",
        "",
        HEAD,
        SECOND_HEAD,
        *(_row(cell) for cell in plan.cells),
        "",
        f"Study: {total['runs']} runs in {len(plan.cells)} settings ({seeds} per point),"
        f" {total['flops']:.3g} FLOPs, about {total['hours']:.3g} hours (estimated);"
        f" {used:.0f} % of the budget, {used * budget['of_target']:.2f} % of the target's cost",
        *_saved(plan),
        f"Expected {100 * plan.level:g} % intervals at the target: {interval(plan.expected)}",
        f"With twice the budget ({doubled['runs']} runs): {more}",
        *(f"Assumption: {note}" for note in plan.notes),
    ]


def _saved(plan: StudyPlan) -> list[str]:
    """What shared trunks save."""
    spent, apart = plan.total["flops"], plan.total["flops_apart"]
    n = int((plan.runs["share"] < 1).sum()) * plan.seeds
    if not n:
        return []
    return [
        f"{n} runs branch off the trunk of a longer run: without that the study would cost"
        f" {apart:.3g} FLOPs ({100 * (1 - spent / apart):.0f} % saved)"
    ]


def _row(cell: Mapping[str, Any]) -> str:
    """One setting; the three factors say how much wider each interval is (in logs) without it."""
    wider = " ".join(f"x{value:.3f}" for value in cell["without"].values())
    points = "; ".join(
        f"{each['batch_tokens']}: {' '.join(f'{lr:.3g}' for lr in each['lr'])}"
        for each in cell["settings"]
    )
    return (
        f"{cell['width']:6} {cell['depth']:5} {human(cell['n_params']):>10}"
        f" {human(cell['tokens']):>7} {cell['runs']:5} {cell['flops']:8.2e} {cell['hours']:8.2g}"
        f"  {wider:27} {points}"
    )


def study(
    plan: StudyPlan, folder: str | Path, target: str | Path | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The study of a plan, as plain values for a recipe file.

    Args:
        plan: The plan.
        folder: Where the file will be; paths are relative to it.
        target: Path of the target's recipe.

    Returns:
        The settings that all runs share, and the cells.
    """
    sizes: tuple[str, ...] = ("width", "depth", "tokens")
    if (
        isinstance(plan.target.model, OwnConfig)
        and "depth" not in plan.target.model.model_fields_set
    ):
        sizes = ("width", "tokens")
    cells = [
        {name: cell[name] for name in sizes} | each
        for cell in plan.cells
        for each in cell["settings"]
    ]
    first = proxy(
        bare(plan.target) if plan.warmup_tokens else plan.target,
        {name: value for name, value in cells[0].items() if name != "lr"},
    )
    shared = first.point() | {
        "engine": plan.target.engine.model_dump(exclude_defaults=True),
        "fit": {"law": "joint"},
    }
    if trainer := first.trainer.model_dump(exclude_defaults=True):
        shared["trainer"] = trainer
    if isinstance(plan.target.model, OwnConfig):
        shared["model"] = {k: v for k, v in shared["model"].items() if v is not None}
    if "data" in shared:
        shared["data"] = {
            name: _relative(value, Path(folder)) if name in PATHS else value
            for name, value in shared["data"].items()
        }
    if plan.warmup_tokens:
        shared["schedule"] |= {"warmup_tokens": plan.warmup_tokens}
    if plan.seeds > 1:
        shared["axes"] = {"seed": list(range(plan.target.seed, plan.target.seed + plan.seeds))}
    named = {"target": _relative(str(target), Path(folder))} if target else {}
    return named | shared, cells


def _relative(path: str | None, folder: Path) -> str | None:
    return os.path.relpath(path, folder) if path and Path(path).exists() else path
