"""Trials that share shapes trained as one model: one forward and one backward pass for all, axis 0 of every parameter the trial.

A trial keeps the model, the optimizer, the average and the files it would have alone; the storage of its weights is a row of the
stack's. So all that follows the gradient is `loop`'s own, and a trial is the same to the bit whoever trains beside it (on a CPU, one
thread, not compiled): what one does, or that it diverges, touches no other row. All read the same batches: common random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scaletune import data, models
from scaletune.counting import stacking as counted
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Trial
from scaletune.training import gradients, loop, tracking
from scaletune.training.loop import Run, released
from scaletune.training.trials import forget_peak, record

MULTIPLIERS = ("multiplier", "embedding", "residual", "logits")  # attributes of modules: a float, [K, 1, 1] where trials differ


class Stack:
    """Runs at one step, as one model: call `update` to take them all a step further."""

    def __init__(self, runs: Sequence[Run]):
        self.runs, first = list(runs), runs[0]
        self.net = models.build(first.recipe, first.corpus.vocab_size, [run.recipe.seed for run in runs]).to(first.acc.device)
        _own_multipliers(self.net, [run.net for run in runs])
        self.parameters = list(self.net.parameters())
        for i, p in enumerate(self.parameters):
            rows = [run.parameters[i] for run in runs]
            p.data = torch.cat([row.detach() for row in rows])
            for row, part in zip(rows, p.data.split(1), strict=True):
                row.data = part  # one storage: an optimizer's step on the row is the stack's
        self.model = loop.compiled(self.net, first.acc) if first.recipe.engine.compile else self.net

    def update(self) -> None:
        """One optimizer step of every run that has not diverged; a run that has keeps its row, and moves no more."""
        began, going = time.perf_counter(), [run for run in self.runs if run.sound]
        for run in going:
            loop.pace(run)
        losses = self._descend(going[0].step)
        for k, run in enumerate(self.runs):
            if run.sound:
                self._lend(run, k)
                run.unread.append(losses[k])
                loop.move(run)
                loop.average(run)
        self.net.zero_grad()
        for run in going:
            loop.clock(run, (time.perf_counter() - began) / len(going))

    def _lend(self, run: Run, k: int) -> None:
        """Row k of the gradients; a tensor that no trial used has none."""
        for own, p in zip(run.parameters, self.parameters, strict=True):
            own.grad = None if p.grad is None else p.grad[k : k + 1]

    def _descend(self, step: int) -> list[Tensor]:
        """Put every trial's gradient of the batch of `step` into its rows; each one's mean loss, on the device."""
        first = self.runs[0]
        losses, parts = [], loop.batch(first, step)
        for part in parts:
            with gradients.precision(first.recipe.training, first.acc):
                loss = self.model(*part)
            (loss if len(parts) == 1 else loss / len(parts)).sum().backward()  # the sum: a mean would divide each by K
            losses.append(loss.detach())
        return list(losses[0]) if len(losses) == 1 else [torch.stack(each).mean() for each in zip(*losses, strict=True)]


def _own_multipliers(net: nn.Module, nets: Sequence[nn.Module]) -> None:
    """Give each row of a stack its own trial's multipliers."""
    for module, *theirs in zip(net.modules(), *(other.modules() for other in nets), strict=True):
        for name in MULTIPLIERS:
            values = [getattr(other, name, None) for other in theirs]
            if len(set(values)) > 1:
                setattr(module, name, torch.tensor(values, device=next(net.parameters()).device)[:, None, None])


def stacked(
    points: Sequence[Recipe], sweeps: Sequence[str], acc: Accelerator, progress: Callable[[float], None] = lambda share: None
) -> Iterator[tuple[Trial, list[float]]]:
    """Train points as one model: what `trial` gives for each, as soon as it is done or has diverged; the others then go on without it.

    UserError on points that cannot stack. Seconds of a record: its share of the common steps, and its own evaluations.
    """
    refuse(points)
    corpus = data.load(points[0].data)
    forget_peak(acc)
    with released(points[0], acc), ExitStack() as trackers:
        runs = [loop.start(point, corpus, acc) for point in points]
        tracks = [trackers.enter_context(tracking.opened(run)) for run in runs]
        for run, track in zip(runs, tracks, strict=True):
            loop.begin(run, track)
        for k in _stopping(runs, tracks, progress):
            loop.finish(runs[k], tracks[k])
            outcome = runs[k].outcome
            yield record(points[k], sweeps[k], corpus, outcome, acc, sum(outcome.seconds.values()), len(runs)), outcome.curve


def refuse(points: Sequence[Recipe]) -> None:
    for point in points:
        if odd := counted.unlike(points[0], point):
            names = ", ".join(f"`{name}`" for name in odd)
            raise UserError(f"trials that train as one model must have the same {names}, but got others: train them apart")
        if len(points) > 1 and (why := counted.alone(point)):
            raise UserError(f"a trial trains by itself with {why}")


def _stopping(runs: Sequence[Run], tracks: Sequence[tracking.Track], progress: Callable[[float], None]) -> Iterator[int]:
    """Train, and name each run when it stops. Those that a checkpoint left behind catch up first."""
    left, stack = list(range(len(runs))), None
    while True:
        for k in [k for k in left if not runs[k].going]:
            left.remove(k)
            yield k
        if not left:
            return
        step = min(runs[k].step for k in left)
        now = [k for k in left if runs[k].step == step]
        stack = _stack(stack, [runs[k] for k in now])
        loop.update(runs[now[0]]) if stack is None else stack.update()
        for k in now:
            loop.after(runs[k], tracks[k])
        progress(min((runs[k].step for k in now if runs[k].sound), default=step) / runs[0].steps)


def _stack(stack: Stack | None, now: list[Run]) -> Stack | None:
    """The stack as it is, or another without the rows that have stopped; None: one run needs none. Compiled, it keeps its rows."""
    if stack is not None:
        kept = [run for run in stack.runs if any(run is other for other in now)]
        if len(kept) == len(now) and (len(now) == len(stack.runs) or now[0].recipe.engine.compile):
            return stack
    return Stack(now) if len(now) > 1 else None
