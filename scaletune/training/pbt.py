"""Population-based training on a stack (arXiv:1711.09846): the worse half goes on from the better half's weights, at another lr.

All members share seed and data, so a member's lineage is one ordinary trial with a piecewise constant lr, and is recorded as that: the
root's lr, and `schedule.kind = "table"` with what it was multiplied by and from when. Trained by itself, that trial is the same to the bit
(on a CPU, one thread, not compiled).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from scaletune import data, optim
from scaletune.recipe import Recipe, identity, with_settings
from scaletune.records import Trial
from scaletune.training import checkpoints, loop
from scaletune.training import trackers as trackers_module
from scaletune.training.loop import Outcome, Run, released
from scaletune.training.stacked_loop import Stack, refuse
from scaletune.training.trials import forget_peak, record


@dataclass(frozen=True)
class Breeding:
    """When the worse half is replaced, and how lr is perturbed then."""

    every: float  # share of the tokens
    factor: float  # lr is multiplied or divided by it
    seed: int


def population(
    points: Sequence[Recipe],
    sweep: str,
    how: Breeding,
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
) -> list[tuple[Trial, list[float]]]:
    """Train the points as one population; what `trial` gives for each lineage that is left at the end, a lineage that is left twice once."""
    refuse(points)
    corpus = data.load(points[0].data)
    forget_peak(acc)
    with released(points[0], acc), ExitStack() as trackers:
        runs = [loop.start(point, corpus, acc) for point in points]
        tracks = [trackers.enter_context(trackers_module.opened(run)) for run in runs]
        for run, track in zip(runs, tracks, strict=True):
            loop.begin(run, track)
        _train(runs, tracks, how, progress)
        for run, track in zip(runs, tracks, strict=True):
            loop.finish(run, track)
        left = {identity(run.recipe, corpus.digest): run for run in reversed(runs)}
        return [
            (_recorded(run, sweep, len(runs)), run.outcome.curve) for run in reversed(left.values())
        ]


def _recorded(run: Run, sweep: str, members: int) -> Trial:
    return record(
        run.recipe,
        sweep,
        run.corpus,
        run.outcome,
        run.acc,
        sum(run.outcome.seconds.values()),
        members,
    )


def _train(
    runs: Sequence[Run],
    tracks: Sequence[trackers_module.Track],
    how: Breeding,
    progress: Callable[[float], None],
) -> None:
    """Step by step as one model; between intervals the worse half is replaced. Ends early where all have diverged."""
    steps, rng, stack = runs[0].steps, np.random.default_rng(how.seed), Stack(runs)
    marks = generations(how.every, steps)
    for run in runs:
        run.evaluations |= set(marks)
    for step in range(1, steps + 1):
        if not any(run.sound for run in runs):
            return
        going = [k for k, run in enumerate(runs) if run.sound]
        stack.update()
        for k in going:
            loop.after(runs[k], tracks[k])
        if step in marks:
            _breed(runs, step, how.factor, rng)
            stack = Stack(runs)  # of the optimizers' new states
        progress(step / steps)


def generations(every: float, steps: int) -> list[int]:
    """The steps after which the worse half is replaced: every so many, the last not."""
    return sorted({round(i * every * steps) for i in range(1, math.ceil(1 / every))} - {0, steps})


def _breed(runs: Sequence[Run], step: int, factor: float, rng: np.random.Generator) -> None:
    """Every member of the worse half by held-out loss, a diverged one before all, goes on from one drawn from the better half."""
    order = sorted(
        range(len(runs)),
        key=lambda k: runs[k].outcome.held_out[-1][1] if runs[k].sound else math.inf,
    )
    better = [k for k in order[: math.ceil(len(runs) / 2)] if runs[k].sound]
    for k in order[math.ceil(len(runs) / 2) :] if better else []:
        parent, up = runs[better[int(rng.integers(len(better)))]], bool(rng.integers(2))
        inherit(runs[k], parent, step, factor if up else 1 / factor)


def inherit(run: Run, parent: Run, step: int, by: float) -> None:
    """Go on from a copy of the parent at `step`, its lr times `by` from there on; what the run was before is lost."""
    run.outcome = Outcome()
    run.unread.clear()
    checkpoints.put_back(run, checkpoints.apart(checkpoints.content(parent)))
    run.recipe, run.plan = _turned(parent.recipe, step, by), parent.plan
    run.schedule, run.id = (
        optim.resolved(run.recipe.schedule, run.recipe.budget),
        identity(run.recipe, run.corpus.digest),
    )


def _turned(recipe: Recipe, step: int, by: float) -> Recipe:
    """The recipe with lr times `by` from `step` on."""
    before = recipe.schedule
    shares, multipliers = (
        (before.shares, before.multipliers) if before.kind == "table" else ([0.0], [1.0])
    )
    table = {
        "schedule.shares": [*shares, step / recipe.budget.steps],
        "schedule.multipliers": [*multipliers, multipliers[-1] * by],
    }
    return with_settings(recipe, {"schedule.kind": "table", **table})
