"""Branched training: one run (the trunk) serves several token horizons of a trial.

Under a WSD schedule a shorter horizon is bitwise the start of a longer one until its cooldown
(arXiv:2405.18392; `scaletune.counting.branches` says when). Until then a branch is a `TrainingRun`
with the model, optimizer and weight average of its trunk: a step of the trunk is also a step of
the branch, which keeps its own curve, evaluations and checkpoints. At its branch point it gets
copies and trains to its end. Its result is bitwise that of the trial trained alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from accelerate import Accelerator

from scaletune import data, optim
from scaletune.counting import branches as counted
from scaletune.recipe import Recipe, trial_id
from scaletune.training import checkpoints, loop, trackers
from scaletune.training.run import Outcome, TrainingRun
from scaletune.training.run_control import UNCONTROLLED, RunControl

Tracks = Mapping[str, trackers.Track]
"""The tracking function of each run, by run id."""


def start_runs(
    points: Sequence[Recipe],
    corpus: data.Corpus,
    acc: Accelerator,
    control: RunControl = UNCONTROLLED,
) -> list[TrainingRun]:
    """Starts one run per trunk, the longest first, with its branches attached.

    Each run continues from its checkpoint. A branch whose checkpoint is at another step than its
    trunk, or past its branch point, trains alone.
    """
    trunks, run_of = list[TrainingRun](), dict[int, TrainingRun]()  # by id() of the recipe point
    for point, trunk_point in sorted(
        zip(points, counted.trunk_points(points), strict=True),
        key=lambda pair: -pair[0].budget.tokens,
    ):
        trunk = run_of.get(id(trunk_point))
        run = (
            _restore_run(point, corpus, acc, control)
            if trunk is None or point.engine.checkpoint_every
            else _attach_branch(trunk, point, Outcome())
        )
        if trunk and run.step == trunk.step <= counted.branch_step(point):
            trunk.branches.append(_attach_branch(trunk, point, run.outcome))
        else:
            trunks.append(run)
            run_of[id(point)] = run
    return trunks


def _restore_run(
    point: Recipe, corpus: data.Corpus, acc: Accelerator, control: RunControl
) -> TrainingRun:
    run = loop.start_run(point, corpus, acc)
    run.control = control
    checkpoints.restore(run)
    loop.report_earlier(run)
    return run


def _attach_branch(trunk: TrainingRun, point: Recipe, outcome: Outcome) -> TrainingRun:
    """A run with the trunk's model and optimizer, for a shorter horizon."""
    schedule = optim.resolve_schedule(point.schedule, point.budget)
    return replace(
        trunk,
        recipe=point,
        schedule=schedule,
        id=trial_id(point, trunk.corpus.digest),
        outcome=outcome,
        unread_losses=[],
        branches=[],
    )


def detach_branches(trunks: Sequence[TrainingRun], tracks: Tracks) -> Iterator[TrainingRun]:
    """Removes the branches that have stopped or reached their branch point, and yields them.

    A branch that goes on has a model of its own.
    """
    for trunk in trunks:
        for branch in [
            branch
            for branch in trunk.branches
            if not branch.active or branch.step == counted.branch_step(branch.recipe)
        ]:
            trunk.branches.remove(branch)
            _read_losses(branch, tracks)
            yield _copy_run(branch) if branch.active else branch


def _copy_run(branch: TrainingRun) -> TrainingRun:
    """The same run with a model, optimizer and average of its own.

    The state is cloned because an optimizer keeps the tensors that it loads.
    """
    run = loop.start_run(branch.recipe, branch.corpus, branch.acc)
    run.control = branch.control
    checkpoints.load_state(run, checkpoints.clone_tensors(checkpoints.run_state(branch)))
    return run


def promote_branches(trunk: TrainingRun, tracks: Tracks) -> list[TrainingRun]:
    """The runs that replace a trunk that stopped before its branches left it.

    The longest healthy branch becomes the trunk of the other healthy ones.
    """
    branches, trunk.branches = trunk.branches, []
    for branch in branches:
        _read_losses(branch, tracks)
    healthy = [branch for branch in branches if branch.healthy]
    for longest in healthy[:1]:
        longest.branches = healthy[1:]
    return [*(branch for branch in branches if not branch.healthy), *healthy[:1]]


def _read_losses(branch: TrainingRun, tracks: Tracks) -> None:
    if branch.unread_losses:
        loop.read_losses(branch, tracks[branch.id])


def remaining_steps(trunks: Sequence[TrainingRun]) -> int:
    """Steps still to train for runs and their branches; runs of one horizon train together."""
    trunk_steps = {
        steps: max(trunk.steps - trunk.step for trunk in trunks if trunk.steps == steps)
        for steps in {trunk.steps for trunk in trunks}
    }
    branch_steps = {
        branch.steps: branch.steps - counted.branch_step(branch.recipe)
        for trunk in trunks
        for branch in trunk.branches
    }
    return sum(trunk_steps.values()) + sum(branch_steps.values())
