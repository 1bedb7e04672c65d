"""Stacked training: trials of equal shapes train as one model, axis 0 of each parameter the trial.

One forward and one backward pass serve all K trials, each at its own step. A trial keeps the
model, optimizer, weight average and files that it has when it trains alone, but the storage of its
weights is a row of the stack's. Everything after the gradient is therefore the code of `loop`, and
each trial gives bitwise the result that it gives alone, whatever the other trials do (on a CPU with
one thread, not compiled). Trials of one seed read the same batches (common random numbers).

A row that becomes free, because its trial has diverged, was stopped or is done, is given to another
trial that starts at step 0 beside the others (`can_refill` says where).

On a GPU one update moves all trials of AdamW or Muon (`optim.fused_stack`), and the whole step is
one CUDA graph (`cuda_graph`). Results are then equal up to rounding.
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
from scaletune.counting import branches as branch_counting
from scaletune.counting import stacks as stack_counting
from scaletune.errors import UserError
from scaletune.models.own import OwnModel
from scaletune.optim import fused_stack
from scaletune.optim.fused_stack import FusedStackOptimizer
from scaletune.recipe import Recipe, trial_id
from scaletune.records import Trial
from scaletune.training import branches, cuda_graph, gradients, loop
from scaletune.training.loop import training_context
from scaletune.training.own_stack import no_own_stack_reason
from scaletune.training.run import TrainingRun
from scaletune.training.run_control import UNCONTROLLED, RunControl
from scaletune.training.trackers import Track, open_trackers
from scaletune.training.trials import build_record, reset_peak_memory
from scaletune.training.vmap_stack import VmapStack
from scaletune.zoo import OwnConfig

MULTIPLIER_ATTRIBUTES = ("multiplier", "embedding", "residual", "logits")
"""Attributes of modules that hold a multiplier: a float, or [K, 1, 1] where trials differ."""

Report = Callable[[int], None]
"""Called with the number of steps that remain."""

Refill = Callable[[int], list[TrainingRun]]
"""Called with the number of free rows; returns runs that start in them."""


class Stack:
    """Runs as one model. `update` trains all of them for one step."""

    def __init__(self, runs: Sequence[TrainingRun]):
        self.runs, first = list(runs), runs[0]
        compiles, device = first.recipe.engine.compile, first.acc.device
        self.own = isinstance(first.net, OwnModel)
        self.net = _build_net(runs).to(device)
        self.parameters = list(self.net.parameters())
        for i, p in enumerate(self.parameters):
            rows = [run.parameters[i] for run in runs]
            # The tensors of a user's module have no trial axis.
            p.data = (torch.stack if self.own else torch.cat)([row.detach() for row in rows])
            for row, view in zip(rows, p.data if self.own else p.data.split(1), strict=True):
                row.data = view  # shared storage: a step of the trial's optimizer moves the stack
        self.model = loop.compile_model(self.net, first.acc) if compiles else self.net
        self.fused = self._build_fused_optimizer()
        self.fused_step = self.fused and (
            torch.compile(self.fused.step) if compiles else self.fused.step
        )
        has_graph = self.fused is not None and cuda_graph.applies(first.recipe, device)
        self.graphed_step = cuda_graph.GraphedStep() if has_graph else None

    def update(self) -> None:
        """One optimizer step of every run that has not stopped. The others keep their rows."""
        start_time, healthy = time.perf_counter(), [run for run in self.runs if run.healthy]
        for run in healthy:
            loop.set_learning_rates(run)
        if self.fused:
            self.fused.read_learning_rates()
        batch = self._load_batch()
        losses = self.graphed_step(self._step, batch) if self.graphed_step else self._step(batch)
        for k, run in enumerate(self.runs):
            if run.healthy:
                run.unread_losses.append(losses[k])
                if not self.fused:
                    self._set_gradients(run, k)
                    loop.apply_gradients(run)
                loop.update_average(run)
        for run in healthy:
            loop.record_step(run, (time.perf_counter() - start_time) / len(healthy))

    def _build_fused_optimizer(self) -> FusedStackOptimizer | None:
        """One update for all trials, if their optimizers and device have one.

        It also moves the rows of stopped runs, which nothing reads.
        """
        opts = [run.opt for run in self.runs]
        if self.own or not fused_stack.applies(opts, self.parameters[0].device):
            return None
        clips = [run.recipe.optimizer.clip for run in self.runs]
        rows = [run.parameters for run in self.runs]
        return FusedStackOptimizer(self.parameters, rows, opts, clips)

    def _set_gradients(self, run: TrainingRun, k: int) -> None:
        """Sets the gradients of run k to row k of the stack's."""
        for row, p in zip(run.parameters, self.parameters, strict=True):
            row.grad = None if p.grad is None else p.grad[k] if self.own else p.grad[k : k + 1]

    def _load_batch(self) -> list[gradients.MicroBatch]:
        """The micro-batches of a step: shared, or with a leading trial axis if they differ."""
        step = next(run.step for run in self.runs if run.healthy)
        keys = [(run.recipe.seed, run.step if run.healthy else step) for run in self.runs]
        batches = {
            key: loop.load_batch(run, key[1])
            for key, run in dict(zip(keys, self.runs, strict=True)).items()
        }
        if len(batches) == 1:
            return batches[keys[0]]
        per_part = zip(*(batches[key] for key in keys), strict=True)
        return [
            (torch.stack([x for x, _ in part]), torch.stack([y for _, y in part]))
            for part in per_part
        ]

    def _step(self, batch: Sequence[gradients.MicroBatch]) -> Tensor:
        """The part of a step that a CUDA graph can record: gradients, and the fused update.

        Returns the mean loss of each trial, [K].
        """
        self.net.zero_grad()  # first, so that a recorded backward pass writes and does not add
        losses = self._backward(batch)
        if self.fused_step:
            self.fused_step()
        return losses

    def _backward(self, batch: Sequence[gradients.MicroBatch]) -> Tensor:
        """Computes the gradients of all trials; the mean loss of each, [K], on the device."""
        first, losses = self.runs[0], []
        for micro_batch in batch:
            with gradients.precision(first.recipe.training, first.acc):
                loss = self.model(*micro_batch).flatten()
            # The sum: a mean would divide each trial's gradient by K.
            (loss if len(batch) == 1 else loss / len(batch)).sum().backward()
            losses.append(loss.detach())
        if len(losses) == 1:
            return losses[0]
        return torch.stack([torch.stack(each).mean() for each in zip(*losses, strict=True)])


class SeparateRuns:
    """Runs whose model cannot be stacked: `update` trains one after the other for one step."""

    def __init__(self, runs: Sequence[TrainingRun]):
        self.runs = list(runs)

    def update(self) -> None:
        """One optimizer step of every run that has not stopped."""
        for run in self.runs:
            if run.healthy:
                loop.update(run)


def stack_runs(runs: Sequence[TrainingRun]) -> Stack | SeparateRuns:
    """The runs as one model; a user's module only if `engine.stack` asks for it."""
    is_own = isinstance(runs[0].net, OwnModel)
    return SeparateRuns(runs) if is_own and not _asks_for_stack(runs[0].recipe) else Stack(runs)


def _asks_for_stack(recipe: Recipe) -> bool:
    return isinstance(recipe.engine.stack, int) and recipe.engine.stack > 1


def _build_net(runs: Sequence[TrainingRun]) -> nn.Module:
    """A model whose parameters have a leading trial axis, for the runs."""
    first, nets = runs[0], [run.net for run in runs]
    if isinstance(first.net, OwnModel):
        return VmapStack(nets)
    seeds = [run.recipe.seed for run in runs]
    net = models.build(first.recipe, first.corpus.vocab_size, seeds)
    _set_row_multipliers(net, nets)
    return net


def _set_row_multipliers(net: nn.Module, nets: Sequence[nn.Module]) -> None:
    """Gives each row of the stack `net` the multipliers of its own trial."""
    device = next(net.parameters()).device
    for module, *rows in zip(net.modules(), *(other.modules() for other in nets), strict=True):
        for name in MULTIPLIER_ATTRIBUTES:
            values = [getattr(row, name, None) for row in rows]
            if len(set(values)) > 1:
                setattr(module, name, torch.tensor(values, device=device)[:, None, None])


def train_stack(
    points: Sequence[Recipe],
    sweeps: Sequence[str],
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
    control: RunControl = UNCONTROLLED,
) -> Iterator[tuple[Trial, list[float]]]:
    """Trains points as one model, and the horizons of a trial on one trunk.

    Args:
        points: Recipe points; UserError if they cannot train together.
        sweeps: Name of the sweep of each point, for its record.
        acc: The Accelerator of this process.
        progress: Called with the share of steps done.
        control: Where held-out losses are reported on the way, what may stop a run, and where
            further points come from.

    Yields:
        What `run_trial` returns for each point, as soon as it is done, has diverged or was stopped.
        `seconds` is its share of the time of shared steps, plus its own evaluations.
    """
    check_stackable(points)
    reset_peak_memory(acc)
    with training_context(points[0], acc), ExitStack() as trackers:
        members = StackMembers(points[0], acc, control, trackers)
        trunks = members.start(points, sweeps)
        total = branches.remaining_steps(trunks)
        stack_size = Counter(point.budget.tokens for point in points)

        def report(remaining: int) -> None:
            progress(max(0.0, 1 - remaining / total))

        refill = members.refill if can_refill(trunks) else None
        for run in _train_by_horizon(trunks, members.tracks, report, refill):
            loop.finish(run, members.tracks[run.id])
            seconds, size = sum(run.outcome.seconds.values()), stack_size[run.recipe.budget.tokens]
            sweep = members.sweeps[run.id]
            record = build_record(
                run.recipe, sweep, members.corpus, run.outcome, acc, seconds, size
            )
            yield record, run.outcome.curve


class StackMembers:
    """The runs that a stack trains, with their trackers and the names of their sweeps."""

    def __init__(self, first: Recipe, acc: Accelerator, control: RunControl, trackers: ExitStack):
        self.first, self.acc, self.control, self.trackers = first, acc, control, trackers
        self.corpus = data.load(first.data)
        self.tracks: dict[str, Track] = {}
        self.sweeps: dict[str, str] = {}

    def start(self, points: Sequence[Recipe], sweeps: Sequence[str]) -> list[TrainingRun]:
        """Starts runs; returns the trunks, with their branches attached."""
        trunks = branches.start_runs(points, self.corpus, self.acc, self.control)
        ids = [trial_id(point, self.corpus.digest) for point in points]
        self.sweeps |= zip(ids, sweeps, strict=True)
        for run in (run for trunk in trunks for run in (trunk, *trunk.branches)):
            self.tracks[run.id] = self.trackers.enter_context(open_trackers(run))
            loop.evaluate_untrained(run, self.tracks[run.id])
        return trunks

    def refill(self, rows: int) -> list[TrainingRun]:
        """Starts runs for free rows, as many as there are points that wait."""
        new = self.control.refill(rows)
        if not new:
            return []
        points = [point for point, _ in new]
        check_stackable([self.first, *points])
        return self.start(points, [sweep for _, sweep in new])


def can_refill(trunks: Sequence[TrainingRun]) -> bool:
    """Whether a freed row can be given to another trial.

    Each row then has its own batch. A compiled step or a CUDA graph would be recorded anew.
    """
    recipe, device = trunks[0].recipe, trunks[0].acc.device
    return (
        device.type == "cpu"
        and not recipe.engine.compile
        and recipe.model.family in stack_counting.OWN_BATCH_FAMILIES
        and not any(trunk.branches for trunk in trunks)
    )


def check_stackable(points: Sequence[Recipe]) -> None:
    """UserError if the points cannot train as one model, or on shared trunks."""
    trunks = [
        point
        for point, trunk in zip(points, branch_counting.trunk_points(points), strict=True)
        if trunk is None
    ]
    for point in trunks:
        if differing := stack_counting.differing_settings(trunks[0], point):
            names = ", ".join(f"`{name}`" for name in differing)
            raise UserError(
                f"trials that train as one model must have the same {names}, but these differ:"
                " train them in separate stacks"
            )
        if len(trunks) > 1 and (reason := stack_counting.no_stack_reason(point)):
            raise UserError(f"a trial must train alone with {reason}")
    stacks_own = isinstance(points[0].model, OwnConfig) and _asks_for_stack(points[0])
    if len(trunks) > 1 and stacks_own and (reason := no_own_stack_reason(points[0])):
        raise UserError(f"a trial must train alone, because {reason}: set `engine.stack` to 1")


def _train_by_horizon(
    runs: Sequence[TrainingRun],
    tracks: branches.Tracks,
    report: Report,
    refill: Refill | None = None,
) -> Iterator[TrainingRun]:
    """Trains the runs of each horizon together, one horizon after the other.

    Yields each run when it stops.
    """
    for steps in sorted({run.steps for run in runs}):
        later = branches.remaining_steps([run for run in runs if run.steps > steps])
        same_horizon = [run for run in runs if run.steps == steps]
        yield from _train_together(same_horizon, tracks, _add_steps(later, report), refill)


def _add_steps(steps: int, report: Report) -> Report:
    """A report for a part of the runs; `steps` is what remains for the others."""
    return lambda remaining: report(remaining + steps)


def _train_together(
    runs: Sequence[TrainingRun],
    tracks: branches.Tracks,
    report: Report,
    refill: Refill | None = None,
) -> Iterator[TrainingRun]:
    """Trains runs and their branches; yields each when it stops.

    With `refill`, runs at different steps train together. Otherwise runs that continue from an
    earlier checkpoint than the others catch up first.
    """
    remaining, stack = list(runs), None
    while remaining:
        yield from _train_branches(remaining, tracks, report)
        for run in [run for run in remaining if not run.active]:
            remaining.remove(run)
            remaining += branches.promote_branches(run, tracks)
            yield run
        if refill and 0 < len(remaining) < len(runs):
            remaining += refill(len(runs) - len(remaining))
        active = [run for run in remaining if run.active]
        step = min((run.step for run in active), default=0)
        if current := [run for run in active if refill or run.step == step]:
            stack = _update_stack(stack, current)
            loop.update(current[0]) if stack is None else stack.update()
            for run in (run for trunk in current for run in (trunk, *trunk.branches)):
                loop.finish_step(run, tracks[run.id])
            _report_steps(current, remaining, report)


def _report_steps(
    current: Sequence[TrainingRun], remaining: Sequence[TrainingRun], report: Report
) -> None:
    """Reports the progress of the stack, or of each run where they are at different steps."""
    if len({run.step for run in current}) > 1:
        for run in current:
            run.control.progress(run.id, run.step / run.steps)
    else:
        report(branches.remaining_steps([run for run in remaining if run.healthy]))


def _train_branches(
    trunks: Sequence[TrainingRun], tracks: branches.Tracks, report: Report
) -> Iterator[TrainingRun]:
    """Trains the branches that leave the trunks at this step to their end; the trunks wait."""
    runs = list(branches.detach_branches(trunks, tracks))
    if runs:
        waiting = branches.remaining_steps(trunks)
        yield from _train_by_horizon(runs, tracks, _add_steps(waiting, report))
        runs[0].acc.free_memory()


def _update_stack(stack: Stack | None, current: list[TrainingRun]) -> Stack | None:
    """The stack of the current runs; None for one run.

    A new one if runs have stopped. A compiled stack stays, because a new shape would compile again.
    """
    if stack is not None:
        kept = [run for run in stack.runs if any(run is other for other in current)]
        same_runs = len(current) == len(stack.runs)
        if len(kept) == len(current) and (same_runs or current[0].recipe.engine.compile):
            return stack
    return Stack(current) if len(current) > 1 else None
