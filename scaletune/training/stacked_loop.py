"""Trials that share shapes trained as one model: one forward and one backward pass for all, axis 0 of every parameter the trial.

A trial keeps the model, the optimizer, the average and the files it would have alone; the storage of its weights is a row of the
stack's. So all that follows the gradient is `loop`'s own, and a trial is the same to the bit whoever trains beside it (on a CPU, one
thread, not compiled): what one does, or that it diverges, touches no other row. Trials of one seed read the same batches, common random
numbers; of several, each its own. On a GPU AdamW and Muon move all trials in one update (`optim.vector`), and the whole step is one
launch (`graphing`): equal to rounding.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scaletune import data, models
from scaletune.counting import branches as branches
from scaletune.counting import stacks as counted
from scaletune.errors import UserError
from scaletune.optim import fused_stack
from scaletune.optim.fused_stack import Vector
from scaletune.recipe import Recipe, identity
from scaletune.records import Trial
from scaletune.training import branches as branches_module
from scaletune.training import cuda_graph, gradients, loop
from scaletune.training import trackers as trackers_module
from scaletune.training.loop import Run, released
from scaletune.training.trials import forget_peak, record

MULTIPLIERS = (
    "multiplier",
    "embedding",
    "residual",
    "logits",
)  # attributes of modules: a float, [K, 1, 1] where trials differ


class Stack:
    """Runs at one step, as one model: call `update` to take them all a step further."""

    def __init__(self, runs: Sequence[Run]):
        self.runs, first = list(runs), runs[0]
        self.seeds = {run.recipe.seed: run for run in runs}
        self.net = models.build(
            first.recipe, first.corpus.vocab_size, [run.recipe.seed for run in runs]
        ).to(first.acc.device)
        _own_multipliers(self.net, [run.net for run in runs])
        self.parameters = list(self.net.parameters())
        for i, p in enumerate(self.parameters):
            rows = [run.parameters[i] for run in runs]
            p.data = torch.cat([row.detach() for row in rows])
            for row, part in zip(rows, p.data.split(1), strict=True):
                row.data = part  # one storage: an optimizer's step on the row is the stack's
        self.model = loop.compiled(self.net, first.acc) if first.recipe.engine.compile else self.net
        self.vector = self._vector()
        self.move = self.vector and (
            torch.compile(self.vector.step) if first.recipe.engine.compile else self.vector.step
        )
        one_launch = self.vector is not None and cuda_graph.applies(first.recipe, first.acc.device)
        self.replayed = cuda_graph.Replayed() if one_launch else None

    def update(self) -> None:
        """One optimizer step of every run that has not diverged; a run that has keeps its row, and moves no more."""
        began, going = time.perf_counter(), [run for run in self.runs if run.sound]
        for run in going:
            loop.pace(run)
        if self.vector:
            self.vector.read_rates()
        parts = self._parts(going[0].step)
        losses = self.replayed(self._step, parts) if self.replayed else self._step(parts)
        for k, run in enumerate(self.runs):
            if run.sound:
                run.unread.append(losses[k])
                if not self.vector:
                    self._lend(run, k)
                    loop.move(run)
                loop.average(run)
        for run in going:
            loop.clock(run, (time.perf_counter() - began) / len(going))

    def _vector(self) -> Vector | None:
        """One update for all, where there is one; it moves the row of a run that has diverged as well, which nobody reads."""
        opts = [run.opt for run in self.runs]
        if not fused_stack.applies(opts, self.parameters[0].device):
            return None
        clips = [run.recipe.optimizer.clip for run in self.runs]
        return Vector(self.parameters, [run.parameters for run in self.runs], opts, clips)

    def _lend(self, run: Run, k: int) -> None:
        """Row k of the gradients; a tensor that no trial used has none."""
        for own, p in zip(run.parameters, self.parameters, strict=True):
            own.grad = None if p.grad is None else p.grad[k : k + 1]

    def _parts(self, step: int) -> list[gradients.Part]:
        """What the trials read at `step`: a batch for all, or with a trial axis in front where their seeds differ."""
        read = {seed: loop.batch(run, step) for seed, run in self.seeds.items()}
        if len(read) == 1:
            return read[self.runs[0].recipe.seed]
        rows = zip(*(read[run.recipe.seed] for run in self.runs), strict=True)
        return [
            (torch.stack([x for x, _ in row]), torch.stack([y for _, y in row])) for row in rows
        ]

    def _step(self, parts: Sequence[gradients.Part]) -> Tensor:
        """What of a step is the device's alone: gradients, and the update where it is one for all. Each trial's mean loss, [K]."""
        self.net.zero_grad()  # before, not after: a recorded backward pass then writes, and adds to nothing
        losses = self._descend(parts)
        if self.move:
            self.move()
        return losses

    def _descend(self, parts: Sequence[gradients.Part]) -> Tensor:
        """Put every trial's gradient into its rows; each one's mean loss, [K], on the device."""
        first, losses = self.runs[0], []
        for part in parts:
            with gradients.precision(first.recipe.training, first.acc):
                loss = self.model(*part)
            (
                loss if len(parts) == 1 else loss / len(parts)
            ).sum().backward()  # the sum: a mean would divide each by K
            losses.append(loss.detach())
        return (
            losses[0]
            if len(losses) == 1
            else torch.stack([torch.stack(each).mean() for each in zip(*losses, strict=True)])
        )


def _own_multipliers(net: nn.Module, nets: Sequence[nn.Module]) -> None:
    """Give each row of a stack its own trial's multipliers."""
    for module, *theirs in zip(net.modules(), *(other.modules() for other in nets), strict=True):
        for name in MULTIPLIERS:
            values = [getattr(other, name, None) for other in theirs]
            if len(set(values)) > 1:
                setattr(
                    module,
                    name,
                    torch.tensor(values, device=next(net.parameters()).device)[:, None, None],
                )


def stacked(
    points: Sequence[Recipe],
    sweeps: Sequence[str],
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[Trial, list[float]]]:
    """Train points as one model, and horizons of a trial on one trunk: what `trial` gives for each, as soon as it is done or has diverged.

    UserError on points that cannot train together. Seconds of a record: its share of the steps it had in common, and its own evaluations.
    """
    refuse(points)
    corpus = data.load(points[0].data)
    forget_peak(acc)
    with released(points[0], acc), ExitStack() as trackers:
        heads = branches_module.started(points, corpus, acc)
        tracks = {
            run.id: trackers.enter_context(trackers_module.opened(run))
            for head in heads
            for run in (head, *head.riders)
        }
        asked = {
            identity(point, corpus.digest): sweep
            for point, sweep in zip(points, sweeps, strict=True)
        }
        rows = Counter(point.budget.tokens for point in points)
        for run in (run for head in heads for run in (head, *head.riders)):
            loop.look(run, tracks[run.id])
        whole = branches_module.steps_left(heads)
        for run in _cohorts(heads, tracks, lambda left: progress(max(0.0, 1 - left / whole))):
            loop.finish(run, tracks[run.id])
            seconds, tokens = sum(run.outcome.seconds.values()), run.recipe.budget.tokens
            yield (
                record(run.recipe, asked[run.id], corpus, run.outcome, acc, seconds, rows[tokens]),
                run.outcome.curve,
            )


def refuse(points: Sequence[Recipe]) -> None:
    """UserError on points that cannot train as one model, or on one trunk."""
    heads = [
        point
        for point, server in zip(points, branches.servers(points), strict=True)
        if server is None
    ]
    for point in heads:
        if odd := counted.unlike(heads[0], point):
            names = ", ".join(f"`{name}`" for name in odd)
            raise UserError(
                f"trials that train as one model must have the same {names}, but got others: train them apart"
            )
        if len(heads) > 1 and (why := counted.alone(point)):
            raise UserError(f"a trial trains by itself with {why}")


def _cohorts(
    runs: Sequence[Run], tracks: branches_module.Tracks, say: Callable[[int], None]
) -> Iterator[Run]:
    """Train the runs of one horizon together, one horizon after the other; `say` is told the steps that are left."""
    for steps in sorted({run.steps for run in runs}):
        after = branches_module.steps_left([run for run in runs if run.steps > steps])
        cohort = [run for run in runs if run.steps == steps]
        yield from _stopping(cohort, tracks, lambda own, after=after: say(own + after))  # type: ignore[misc]


def _stopping(
    runs: Sequence[Run], tracks: branches_module.Tracks, say: Callable[[int], None]
) -> Iterator[Run]:
    """Train runs, and those that ride on them; each when it stops. Those that a checkpoint left behind catch up first."""
    going, stack = list(runs), None
    while going:
        yield from _branched(going, tracks, say)
        for run in [run for run in going if not run.going]:
            going.remove(run)
            going += branches_module.heirs(run, tracks)
            yield run
        able = [run for run in going if run.going]
        step = min((run.step for run in able), default=0)
        if now := [run for run in able if run.step == step]:
            stack = _stack(stack, now)
            loop.update(now[0]) if stack is None else stack.update()
            for run in (run for head in now for run in (head, *head.riders)):
                loop.after(run, tracks[run.id])
            say(branches_module.steps_left([run for run in going if run.sound]))


def _branched(
    heads: Sequence[Run], tracks: branches_module.Tracks, say: Callable[[int], None]
) -> Iterator[Run]:
    """Train what leaves the heads at this step to its end, and forget its models; the heads wait."""
    runs = list(branches_module.leaving(heads, tracks))
    if runs:
        waiting = branches_module.steps_left(heads)
        yield from _cohorts(runs, tracks, lambda own: say(own + waiting))
        runs[0].acc.free_memory()


def _stack(stack: Stack | None, now: list[Run]) -> Stack | None:
    """The stack as it is, or another without the rows that have stopped; None: one run needs none. Compiled, it keeps its rows."""
    if stack is not None:
        kept = [run for run in stack.runs if any(run is other for other in now)]
        if len(kept) == len(now) and (len(now) == len(stack.runs) or now[0].recipe.engine.compile):
            return stack
    return Stack(now) if len(now) > 1 else None
