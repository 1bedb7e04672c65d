"""The training loop, and the trial under way that it moves step by step."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from scaletune import counting, data, models, optim
from scaletune.errors import UserError
from scaletune.recipe import Recipe, Schedule, identity
from scaletune.rules import Planned
from scaletune.training import checkpoints, gradients, onednn_matmul, trackers
from scaletune.training.evaluation import evaluate
from scaletune.training.gradient_noise import Noise

LOOK = {
    "cpu": 1,
    "cuda": 16,
}  # steps between looks at the losses: each look makes the host wait for the device


@dataclass
class Outcome:
    """What a training loop leaves behind."""

    status: str = "done"
    message: str = ""
    curve: list[float] = field(default_factory=list)  # training loss of each step, nats per token
    loss: float | None = None  # held-out
    held_out: list[list[float]] = field(default_factory=list)  # [tokens, loss] of each evaluation
    noise: Noise = field(default_factory=Noise)
    spent: float = 0.0  # optimizer steps, each divided by the trials it served
    trunk: dict[str, Any] = field(
        default_factory=dict
    )  # the trial whose run it rode on, and for how many tokens
    seconds: dict[str, float] = field(
        default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "compile": 0.0}
    )

    def diverged(self, message: str) -> None:
        self.status, self.message = "diverged", message


@dataclass(eq=False)
class Run:
    """A trial under way. A rider has its head's model, optimizer and average: until it branches the two are the same (`branching`)."""

    recipe: Recipe
    corpus: data.Corpus
    acc: Accelerator
    plan: list[Planned]
    net: nn.Module  # the plain model
    descent: gradients.Descent
    opt: Optimizer
    schedule: Schedule  # in shares of the budget
    ema: AveragedModel | None
    id: str
    outcome: Outcome = field(default_factory=Outcome)
    unread: list[Tensor] = field(default_factory=list)  # losses that are still on the device
    riders: list[Run] = field(
        default_factory=list
    )  # shorter horizons of the same trial, the longest first

    def __post_init__(self) -> None:
        self.parameters = list(self.net.parameters())
        self.steps = self.recipe.budget.steps
        self.evaluations = {
            math.ceil(share * self.steps) for share in self.recipe.engine.evaluate_at
        } - {self.steps}

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.outcome.curve) + len(self.unread)

    @property
    def sound(self) -> bool:
        """Not diverged, as far as the losses have been read."""
        return self.outcome.status == "done"

    @property
    def going(self) -> bool:
        """Neither diverged nor at its last step."""
        return self.sound and self.step < self.steps

    @property
    def ceiling(self) -> float:
        """A loss above it, or none at all, is a divergence; of a regression, which has no vocabulary, one that is not finite."""
        return (
            2 * math.log(self.corpus.vocab_size)
            if self.corpus.vocab_size > 1
            else sys.float_info.max
        )


def start(recipe: Recipe, corpus: data.Corpus, acc: Accelerator) -> Run:
    """Build what a trial trains with. UserError unless there are as many processes as it asks for."""
    if acc.num_processes != recipe.engine.processes:
        raise UserError(
            f"`engine.processes` must be how many there are, but got {recipe.engine.processes} and there are {acc.num_processes}"
        )
    net = models.build(recipe, corpus.vocab_size)
    model = acc.prepare(net)
    plan = counting.planned(recipe, corpus.vocab_size)
    opt = optim.optimizer(net, plan, recipe.optimizer)
    schedule, ema = (
        optim.resolved(recipe.schedule, recipe.budget),
        optim.ema(net, recipe.schedule, recipe.budget),
    )
    descent = gradients.Descent(
        compiled(model, acc) if recipe.engine.compile else model, net, recipe.training, acc
    )
    return Run(
        recipe, corpus, acc, plan, net, descent, opt, schedule, ema, identity(recipe, corpus.digest)
    )


def compiled(model: nn.Module, acc: Accelerator) -> Callable[..., Tensor]:
    """The model by torch.compile; UserError where nothing could compile it."""
    if acc.device.type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    ):
        raise UserError(
            "`engine.compile` needs a C++ compiler to train on a CPU, but neither g++ nor clang++ is on the path"
        )
    return torch.compile(model)


@contextmanager
def released(recipe: Recipe, acc: Accelerator) -> Iterator[None]:
    """Train in the block, by the quicker products; keep nothing of it, as one process trains hundreds of trials."""
    try:
        with onednn_matmul.quick(recipe, acc.device):
            yield
    finally:
        acc.free_memory()  # Accelerate keeps every model it has prepared
        if recipe.engine.compile:
            torch.compiler.reset()  # and the compiler every graph, until it gives up on the model's code


def train(
    recipe: Recipe,
    corpus: data.Corpus,
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
) -> Outcome:
    """Train the recipe's point. A loss that is not finite, or above twice ln(vocabulary), ends it as "diverged".

    With `engine.checkpoint_every` it goes on from where a killed run of the same trial was, to the same bits on a CPU.
    """
    run = start(recipe, corpus, acc)
    with trackers.opened(run) as track:
        begin(run, track)
        while run.going:
            update(run)
            after(run, track)
            progress(run.step / run.steps)
        finish(run, track)
    return run.outcome


def begin(run: Run, track: trackers.Track) -> None:
    """Go on from a checkpoint, or evaluate what is not trained yet, if either is asked for."""
    checkpoints.restore(run)
    look(run, track)


def look(run: Run, track: trackers.Track) -> None:
    """Evaluate what is not trained yet, if that is asked for."""
    if 0 in run.evaluations and not run.step:
        _hold_out(run, track)


def finish(run: Run, track: trackers.Track) -> None:
    """The held-out loss of a trial that has not diverged."""
    if run.sound:
        run.outcome.loss = _hold_out(run, track)


def after(run: Run, track: trackers.Track) -> None:
    """What a step is followed by: a look at the losses, an evaluation, a checkpoint, each when it is time."""
    evaluates, saves, last = run.step in run.evaluations, _saves(run), run.step == run.steps
    if evaluates or saves or last or len(run.unread) >= LOOK.get(run.acc.device.type, 1):
        read(run, track)
    if evaluates and run.sound:
        _hold_out(run, track)
    if saves and run.sound:
        checkpoints.save(run)


def _saves(run: Run) -> bool:
    """Every so many steps, and the trained weights at the end."""
    every = run.recipe.engine.checkpoint_every
    return every > 0 and (run.step % every == 0 or run.step == run.steps)


def update(run: Run) -> None:
    """One optimizer step; its loss is left unread."""
    began = time.perf_counter()
    pace(run)
    descend(run, run.step)
    average(run)
    clock(run, time.perf_counter() - began)


def clock(run: Run, seconds: float) -> None:
    """Put down the step it has taken: one for all that ride, each its part of the time. The first one of a compiled model compiles it."""
    crew = [run, *run.riders]
    for each in crew:
        compiling = each.recipe.engine.compile and not each.outcome.seconds["compile"]
        each.outcome.seconds["compile" if compiling else "train"] += seconds / len(crew)
        each.outcome.spent += 1 / len(crew)
    for rider in run.riders:
        rider.unread.append(run.unread[-1])
        rider.outcome.trunk = {
            "trunk": run.id,
            "trunk_tokens": rider.step * rider.recipe.budget.batch_tokens,
        }


def pace(run: Run) -> None:
    """The learning rates of the step to come; UserError when they are not the plan's."""
    step, steps, warmup = run.step, run.steps, run.recipe.schedule.warmup_tokens
    warmed = (
        (step + 0.5) * run.recipe.budget.batch_tokens / warmup if warmup else None
    )  # the same for every horizon, to the bit
    optim.set_share(
        run.opt, run.schedule, (step + 0.5) / steps, warmed
    )  # the middle of its tokens: no step has a learning rate of 0
    if step in (
        0,
        min(steps - 1, math.ceil(run.schedule.warmup * steps)),
        steps - 1,
    ):  # the start, after warmup, the end
        optim.guard(run.opt, run.plan, f"at step {step} of {steps}")


def average(run: Run) -> None:
    """Take the weights into their average, if there is one."""
    if run.ema:
        run.ema.update_parameters(run.net)


def batch(run: Run, step: int) -> list[gradients.Part]:
    """What this process reads at `step`."""
    settings = run.recipe
    rows = run.corpus.batch(
        settings.seed,
        step,
        settings.budget.batch_tokens // settings.data.seq_len,
        settings.data.seq_len,
    )
    return gradients.parts(rows, run.acc, settings.engine.accumulation)


def descend(run: Run, step: int) -> None:
    """Gradient of the batch of `step`, clipped, and the optimizer's step with the learning rates its groups have."""
    parts, every = batch(run, step), run.recipe.engine.noise_every
    measures = every and step % every == 0
    run.unread.append(
        run.descent.measured(parts, run.outcome.noise) if measures else run.descent.backward(parts)
    )
    move(run)


def move(run: Run) -> None:
    """Clip the gradient and step with it."""
    nn.utils.clip_grad_norm_(run.parameters, run.recipe.optimizer.clip)
    run.opt.step(lambda: run.unread[-1].reshape(1))  # type: ignore[arg-type, return-value]  # its loss, which MoMo steps by
    run.opt.zero_grad()


def read(run: Run, track: trackers.Track) -> None:
    """Fetch the unread losses, the mean over processes; the curve ends with the first that is a divergence."""
    began = time.perf_counter()
    losses = torch.stack(run.unread)
    run.unread.clear()
    for loss in (run.acc.reduce(losses, "mean") if run.acc.num_processes > 1 else losses).tolist():
        step, curve = len(run.outcome.curve), run.outcome.curve
        curve.append(loss)
        track({"train/loss": loss}, step)
        if not loss <= run.ceiling:
            run.outcome.diverged(
                _why(loss, f"loss {loss:.3g} at step {step} of {run.steps}", curve[:-1], run)
            )
            break
    run.outcome.seconds["train"] += time.perf_counter() - began


def _why(loss: float, what: str, good: list[float], run: Run) -> str:
    """What diverged, when, by which measure, and what there was before: the `good` losses."""
    said = f"{what}, " + (
        f"above 2 ln(vocabulary) = {run.ceiling:.3g}" if math.isfinite(loss) else "not finite"
    )
    if good:
        return f"{said}; last good loss {good[-1]:.4g} at step {len(good) - 1}"
    return f"{said}, before any update: `init_std` or a multiplier is too large for {run.recipe.training.precision}, or the data is not finite"


def _hold_out(run: Run, track: trackers.Track) -> float | None:
    """Evaluate, the averaged weights where there are any; a loss that is not finite or above the ceiling is a divergence."""
    began = time.perf_counter()
    with optim.judged(run.net, run.opt, run.ema):
        loss = evaluate(run.net, run.corpus, run.recipe, run.acc)
    run.outcome.seconds["evaluate"] += time.perf_counter() - began
    if not loss <= run.ceiling:
        when = "the last step" if run.step == run.steps else f"step {run.step} of {run.steps}"
        run.outcome.diverged(
            _why(loss, f"held-out loss {loss:.3g} after {when}", run.outcome.curve, run)
        )
        return None
    track({"held_out/loss": loss}, run.step)
    run.outcome.held_out.append([run.step * run.recipe.budget.batch_tokens, loss])
    return loss
