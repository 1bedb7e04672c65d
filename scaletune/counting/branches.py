"""Which token horizons of one trial can share a trunk, and how much that saves.

The batch of a step depends only on (seed, step), the lr of a stable phase on nothing. With the
schedule "wsd" and a warmup in tokens, a shorter horizon is therefore bitwise the start of a
longer one, followed by a decay of its own (arXiv:2405.18392, section 4: horizons T, 2T, 4T with a
decay of d cost 4T + d * 3T instead of 7T). With "constant", evaluated on averaged weights or not,
the whole shorter horizon is the start of the longer one. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scaletune.counting.stacks import SECTIONS
from scaletune.recipe import Recipe
from scaletune.records import digest

NUMERIC_KEYS = ("accumulation", "compile")
"""Keys of the engine that change a result bitwise."""


def no_branch_reason(recipe: Recipe) -> str:
    """Why a point cannot share a trunk with its other horizons; empty if it can."""
    schedule, engine = recipe.schedule, recipe.engine
    if recipe.foreign:
        return "your own trainer trains each token budget from its start"
    if schedule.kind not in ("wsd", "constant"):
        return (
            f"the schedule has no constant phase (`schedule.kind = {schedule.kind!r}`):"
            " use wsd or constant"
        )
    if schedule.warmup and schedule.warmup_tokens is None:
        return (
            f"`schedule.warmup = {schedule.warmup:g}` is a share of the token budget, so each"
            " token budget has a different warmup: set `schedule.warmup_tokens`"
        )
    if recipe.optimizer.family == "schedulefree_adamw":
        return (
            "`optimizer.family = 'schedulefree_adamw'` changes its weights for an evaluation and"
            " back, which rounds them"
        )
    if engine.processes > 1:
        return f"`engine.processes = {engine.processes}`: several processes train one trial"
    if engine.noise_every:
        return f"`engine.noise_every = {engine.noise_every}` measures the gradients of one trial"
    return ""


def trunk_key(recipe: Recipe) -> str:
    """A digest of what the horizons of one trial share; empty if they cannot share a trunk."""
    if recipe.engine.branch is False or no_branch_reason(recipe):
        return ""
    content = recipe.model_dump(include=set(SECTIONS))
    del content["budget"]["tokens"]
    return digest(content | {"engine": {name: content["engine"][name] for name in NUMERIC_KEYS}})


def branch_step(recipe: Recipe) -> int:
    """Number of steps whose learning rate does not depend on the horizon.

    The steps whose middle is in the stable phase; with "constant", all of them.
    """
    steps, schedule = recipe.budget.steps, recipe.schedule
    if schedule.kind == "constant":
        return steps
    stable = 1.0 - schedule.decay  # computed as in `optim.multiplier`
    near = int(stable * steps)
    return next(
        (step for step in range(max(near - 1, 0), steps) if (step + 0.5) / steps > stable), steps
    )


def can_branch_off(longer: Recipe, shorter: Recipe) -> bool:
    """Whether `shorter` can branch off a run of `longer`."""
    return (
        longer.budget.tokens > shorter.budget.tokens
        and branch_step(shorter) > 0
        and trunk_key(longer) == trunk_key(shorter) != ""
    )


def trunk_points(points: Sequence[Recipe]) -> list[Recipe | None]:
    """For each point the longest horizon of its trial, if it can branch off that run."""
    keys, longest = [trunk_key(point) for point in points], dict[str, Recipe]()
    pairs = list(zip(keys, points, strict=True))
    for key, point in sorted(pairs, key=lambda pair: pair[1].budget.tokens):
        longest[key] = point
    return [
        longest[key] if key and can_branch_off(longest[key], point) else None
        for key, point in pairs
    ]


def steps_after_branching(points: Sequence[Recipe]) -> list[int]:
    """Optimizer steps of each point with shared trunks: all of the longest, else the decay only."""
    pairs = zip(points, trunk_points(points), strict=True)
    return [point.budget.steps - (branch_step(point) if trunk else 0) for point, trunk in pairs]


def branched_cost(points: Sequence[Recipe], rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """FLOPs and estimated seconds of points with shared trunks, and how many branch off one.

    `rows` holds the result of `counting.count_point` for each point.
    """
    steps = zip(steps_after_branching(points), points, strict=True)
    shares = [after / point.budget.steps for after, point in steps]
    pairs = list(zip(shares, rows, strict=True))
    return {
        "flops": sum(share * row["flops"] for share, row in pairs),
        "seconds": sum(share * row["seconds"] for share, row in pairs),
        "branches": sum(share < 1 for share in shares),
    }
