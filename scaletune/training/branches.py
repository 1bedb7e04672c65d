"""One run for several horizons of a trial: the shorter ones ride on the longest until their cooldown, then go on by themselves.

A rider is a `Run` that has its head's model, optimizer and average: a step of the head is one of its own, with its own curve, its own
evaluations and its own checkpoints. Where the schedules part it gets copies. So it is to the bit the trial that it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from accelerate import Accelerator

from scaletune import data, optim
from scaletune.counting import branches as counted
from scaletune.recipe import Recipe, identity
from scaletune.training import checkpoints, loop, trackers
from scaletune.training.loop import Outcome, Run

Tracks = Mapping[str, trackers.Track]  # of a run's id


def started(points: Sequence[Recipe], corpus: data.Corpus, acc: Accelerator) -> list[Run]:
    """The runs that train, each gone on from its checkpoint, with the shorter ones that ride on them, the longest first.

    One that a checkpoint left at another step than its head, or beyond its branch point, trains by itself.
    """
    heads, trained = list[Run](), dict[int, Run]()  # of the recipe that a run trains
    for point, server in sorted(
        zip(points, counted.servers(points), strict=True), key=lambda pair: -pair[0].budget.tokens
    ):
        head = trained.get(id(server))
        run = (
            _restored(point, corpus, acc)
            if head is None or point.engine.checkpoint_every
            else _rider(head, point, Outcome())
        )
        if head and run.step == head.step <= counted.branch_step(point):
            head.riders.append(_rider(head, point, run.outcome))
        else:
            heads.append(run)
            trained[id(point)] = run
    return heads


def _restored(point: Recipe, corpus: data.Corpus, acc: Accelerator) -> Run:
    run = loop.start(point, corpus, acc)
    checkpoints.restore(run)
    return run


def _rider(head: Run, point: Recipe, outcome: Outcome) -> Run:
    schedule = optim.resolved(point.schedule, point.budget)
    return replace(
        head,
        recipe=point,
        schedule=schedule,
        id=identity(point, head.corpus.digest),
        outcome=outcome,
        unread=[],
        riders=[],
    )


def leaving(heads: Sequence[Run], tracks: Tracks) -> Iterator[Run]:
    """The riders whose ride is over, taken off their heads: stopped, or with a model of their own."""
    for head in heads:
        for rider in [
            rider
            for rider in head.riders
            if not rider.going or rider.step == counted.branch_step(rider.recipe)
        ]:
            head.riders.remove(rider)
            _read(rider, tracks)
            yield _parted(rider) if rider.going else rider


def _parted(rider: Run) -> Run:
    """The same run with a model, an optimizer and an average of its own: an optimizer keeps what it is given, so that is copied."""
    run = loop.start(rider.recipe, rider.corpus, rider.acc)
    checkpoints.put_back(run, checkpoints.apart(checkpoints.content(rider)))
    return run


def heirs(head: Run, tracks: Tracks) -> list[Run]:
    """Who goes on when the head has stopped before its riders left: they, those that are sound on the longest of them."""
    riders, head.riders = head.riders, []
    for rider in riders:
        _read(rider, tracks)
    sound = [rider for rider in riders if rider.sound]
    for longest in sound[:1]:
        longest.riders = sound[1:]
    return [*(rider for rider in riders if not rider.sound), *sound[:1]]


def _read(rider: Run, tracks: Tracks) -> None:
    if rider.unread:
        loop.read(rider, tracks[rider.id])


def steps_left(heads: Sequence[Run]) -> int:
    """Steps that runs and their riders still take, those of one horizon together."""
    left = {
        steps: max(head.steps - head.step for head in heads if head.steps == steps)
        for steps in {head.steps for head in heads}
    }
    own = {
        rider.steps: rider.steps - counted.branch_step(rider.recipe)
        for head in heads
        for rider in head.riders
    }
    return sum(left.values()) + sum(own.values())
