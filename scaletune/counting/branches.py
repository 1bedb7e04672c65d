"""Which points are horizons of one trial that a single trunk may serve, and what that saves. Trains nothing.

The batch of a step is a function of (seed, step), the learning rate of a stable phase of nothing else. So under "wsd", warmup in
tokens, a shorter horizon is to the bit the start of a longer one, then a cooldown of its own (arXiv:2405.18392, section 4: horizons
T, 2T, 4T with a cooldown of d cost 4T + d * 3T in place of 7T); under "constant", judged by an average of weights or not, all of it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scaletune.counting.stacks import READ
from scaletune.recipe import Recipe
from scaletune.records import digest

COMPUTES = ("accumulation", "compile")  # of the engine: what the bits hang on


def apart(recipe: Recipe) -> str:
    """Why a point shares no trunk with its other horizons; empty when it may."""
    schedule, engine = recipe.schedule, recipe.engine
    if schedule.kind not in ("wsd", "constant"):
        return f"`schedule.kind = {schedule.kind!r}`: its learning rate knows the last token from the first (wsd and constant do not)"
    if schedule.warmup and schedule.warmup_tokens is None:
        return f"`schedule.warmup = {schedule.warmup:g}`: a share of each horizon is another warmup; say `schedule.warmup_tokens`"
    if recipe.optimizer.family == "schedulefree_adamw":
        return "`optimizer.family = 'schedulefree_adamw'`: to evaluate it moves its weights and back, which rounds them"
    if engine.processes > 1:
        return f"`engine.processes = {engine.processes}`: its processes train one trial"
    return (
        f"`engine.noise_every = {engine.noise_every}`: it measures one trial's gradients"
        if engine.noise_every
        else ""
    )


def trunk(recipe: Recipe) -> str:
    """A digest of all that the horizons of one trial have in common; empty where they train apart."""
    if recipe.engine.branch is False or apart(recipe):
        return ""
    content = recipe.model_dump(include=set(READ))
    del content["budget"]["tokens"]
    return digest(content | {"engine": {name: content["engine"][name] for name in COMPUTES}})


def branch_step(recipe: Recipe) -> int:
    """Steps whose learning rate no horizon changes: those whose middle is not beyond the stable phase, all of them under "constant"."""
    steps, schedule = recipe.budget.steps, recipe.schedule
    if schedule.kind == "constant":
        return steps
    stable = 1.0 - schedule.decay  # as `optim.multiplier` has it
    near = int(stable * steps)
    return next(
        (step for step in range(max(near - 1, 0), steps) if (step + 0.5) / steps > stable), steps
    )


def serves(longer: Recipe, shorter: Recipe) -> bool:
    """Whether a run of one is, up to a step of it, one of the other."""
    return (
        longer.budget.tokens > shorter.budget.tokens
        and branch_step(shorter) > 0
        and trunk(longer) == trunk(shorter) != ""
    )


def servers(points: Sequence[Recipe]) -> list[Recipe | None]:
    """For each point the longest horizon of its trial, if it may branch off that one's run."""
    keys, longest = [trunk(point) for point in points], dict[str, Recipe]()
    for key, point in sorted(
        zip(keys, points, strict=True), key=lambda pair: pair[1].budget.tokens
    ):
        longest[key] = point
    pairs = zip(keys, points, strict=True)
    return [longest[key] if key and serves(longest[key], point) else None for key, point in pairs]


def own_steps(points: Sequence[Recipe]) -> list[int]:
    """Optimizer steps that each point costs when trunks are shared: all of the longest horizon, the cooldown of the others."""
    pairs = zip(points, servers(points), strict=True)
    return [point.budget.steps - (branch_step(point) if server else 0) for point, server in pairs]


def saving(points: Sequence[Recipe], rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """FLOPs and guessed seconds of points whose horizons share trunks, and how many branch off one; `rows`: what `counting.count` says of each alone."""
    shares = [
        steps / point.budget.steps for steps, point in zip(own_steps(points), points, strict=True)
    ]
    pairs = list(zip(shares, rows, strict=True))
    return {
        "flops": sum(share * row["flops"] for share, row in pairs),
        "seconds": sum(share * row["seconds"] for share, row in pairs),
        "branches": sum(share < 1 for share in shares),
    }
