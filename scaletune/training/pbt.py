"""Population-based training of lr on a stack (arXiv:1711.09846).

At intervals the members with the higher losses copy the weights of members with lower losses and
continue with a perturbed lr (exploit and explore). All members share seed and data, so the lineage
of a member is one ordinary trial with a piecewise constant lr. It is recorded as that: the initial
lr, and `schedule.kind = "table"` with the multipliers and when they start. That trial trained alone
gives bitwise the same result (on a CPU with one thread, not compiled).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from scaletune import data, optim
from scaletune.recipe import Recipe, trial_id, with_settings
from scaletune.records import Trial
from scaletune.training import checkpoints, loop
from scaletune.training.loop import training_context
from scaletune.training.run import Outcome, TrainingRun
from scaletune.training.stacked_loop import check_stackable, stack_runs
from scaletune.training.trackers import Track, open_trackers
from scaletune.training.trials import build_record, reset_peak_memory


@dataclass(frozen=True)
class PBTSettings:
    """When the worse half of a population is replaced, and how its lr is perturbed."""

    every: float
    """Interval, as a share of the tokens."""

    factor: float
    """The lr is multiplied or divided by this factor."""

    seed: int
    """Seed of the choice of parents and directions."""


def train_population(
    points: Sequence[Recipe],
    sweep: str,
    settings: PBTSettings,
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
) -> list[tuple[Trial, list[float]]]:
    """Trains the points as one population.

    Returns:
        (record, training losses) of each surviving lineage; equal lineages are returned once.
    """
    check_stackable(points)
    corpus = data.load(points[0].data)
    reset_peak_memory(acc)
    with training_context(points[0], acc), ExitStack() as trackers:
        runs = [loop.start_run(point, corpus, acc) for point in points]
        tracks = [trackers.enter_context(open_trackers(run)) for run in runs]
        for run, track in zip(runs, tracks, strict=True):
            loop.begin(run, track)
        _train(runs, tracks, settings, progress)
        for run, track in zip(runs, tracks, strict=True):
            loop.finish(run, track)
        lineages = {trial_id(run.recipe, corpus.digest): run for run in reversed(runs)}
        return [
            (_build_record(run, sweep, len(runs)), run.outcome.curve)
            for run in reversed(lineages.values())
        ]


def _build_record(run: TrainingRun, sweep: str, members: int) -> Trial:
    seconds = sum(run.outcome.seconds.values())
    return build_record(run.recipe, sweep, run.corpus, run.outcome, run.acc, seconds, members)


def _train(
    runs: Sequence[TrainingRun],
    tracks: Sequence[Track],
    settings: PBTSettings,
    progress: Callable[[float], None],
) -> None:
    """Trains the runs as one model to the end, or until all have diverged."""
    rng, stack = np.random.default_rng(settings.seed), stack_runs(runs)
    steps = runs[0].steps
    replacement_steps = exploit_steps(settings.every, steps)
    for run in runs:
        run.evaluations |= set(replacement_steps)
    for step in range(1, steps + 1):
        if not any(run.healthy for run in runs):
            return
        healthy = [k for k, run in enumerate(runs) if run.healthy]
        stack.update()
        for k in healthy:
            loop.finish_step(runs[k], tracks[k])
        if step in replacement_steps:
            _replace_worse_half(runs, step, settings.factor, rng)
            stack = stack_runs(runs)  # the runs have new optimizer states
        progress(step / steps)


def exploit_steps(every: float, steps: int) -> list[int]:
    """The steps after which the worse half is replaced. The last step is not one of them."""
    return sorted({round(i * every * steps) for i in range(1, math.ceil(1 / every))} - {0, steps})


def _replace_worse_half(
    runs: Sequence[TrainingRun], step: int, factor: float, rng: np.random.Generator
) -> None:
    """Each run of the worse half by held-out loss becomes a copy of a random run of the better.

    Diverged runs are in the worse half.
    """
    order = sorted(
        range(len(runs)),
        key=lambda k: runs[k].outcome.held_out[-1][1] if runs[k].healthy else math.inf,
    )
    better = [k for k in order[: math.ceil(len(runs) / 2)] if runs[k].healthy]
    for k in order[math.ceil(len(runs) / 2) :] if better else []:
        parent, up = runs[better[int(rng.integers(len(better)))]], bool(rng.integers(2))
        copy_member(runs[k], parent, step, factor if up else 1 / factor)


def copy_member(run: TrainingRun, parent: TrainingRun, step: int, lr_factor: float) -> None:
    """Makes `run` a copy of `parent` at `step`, with its lr multiplied by `lr_factor` from then."""
    run.outcome = Outcome()
    run.unread_losses.clear()
    checkpoints.load_state(run, checkpoints.clone_tensors(checkpoints.run_state(parent)))
    run.recipe, run.plan = _multiply_lr(parent.recipe, step, lr_factor), parent.plan
    run.schedule = optim.resolve_schedule(run.recipe.schedule, run.recipe.budget)
    run.id = trial_id(run.recipe, run.corpus.digest)


def _multiply_lr(recipe: Recipe, step: int, factor: float) -> Recipe:
    """The recipe with its lr multiplied by `factor` from `step` on."""
    old = recipe.schedule
    shares, multipliers = (old.shares, old.multipliers) if old.kind == "table" else ([0.0], [1.0])
    settings = {
        "schedule.kind": "table",
        "schedule.shares": [*shares, step / recipe.budget.steps],
        "schedule.multipliers": [*multipliers, multipliers[-1] * factor],
    }
    return with_settings(recipe, settings)
