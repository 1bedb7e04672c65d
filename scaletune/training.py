"""One trial: build, train through Accelerate, evaluate on held-out data. The only module that imports accelerate."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from accelerate import Accelerator
from torch import nn

from scaletune import counting, data, models, optim
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Trial

EVAL_ROWS = 64  # windows a forward pass: bounds memory, not the result


@dataclass
class Outcome:
    """What a training loop leaves behind."""

    status: str = "done"
    message: str = ""
    curve: list[float] = field(default_factory=list)  # training loss of each step, nats per token
    loss: float | None = None  # held-out


def accelerator() -> Accelerator:
    """This process's Accelerator: a GPU when there is one."""
    return Accelerator(cpu=not torch.cuda.is_available())


def train(recipe: Recipe, corpus: data.Corpus, acc: Accelerator, progress: Callable[[float], None] = lambda share: None) -> Outcome:
    """Train the recipe's point. A loss that is not finite, or above twice ln(vocabulary), ends it as "diverged"."""
    rows, steps = recipe.budget.batch_tokens // recipe.data.seq_len, recipe.budget.steps
    if rows % acc.num_processes:
        raise UserError(f"`batch_tokens / seq_len % processes == 0` must hold, but got {rows} rows on {acc.num_processes} processes")
    model = models.build(recipe, corpus.vocab_size)
    plan = counting.planned(recipe, corpus.vocab_size)
    opt = optim.optimizer(model, plan, recipe.optimizer)
    guarded = {0, min(steps - 1, math.ceil(recipe.schedule.warmup * steps)), steps - 1}  # the start, after warmup, the end
    model, opt = acc.prepare(model, opt)
    ceiling, outcome = 2 * math.log(corpus.vocab_size), Outcome()
    for step in range(steps):
        optim.set_share(opt, recipe.schedule, (step + 0.5) / steps)  # the middle of its tokens: no step has a learning rate of 0
        if step in guarded:
            optim.guard(opt, plan, f"at step {step} of {steps}")
        batch = corpus.batch(recipe.seed, step, rows, recipe.data.seq_len)
        inputs, targets = (torch.from_numpy(part[acc.process_index :: acc.num_processes]).to(acc.device) for part in batch)
        loss = model(inputs, targets).sum()
        outcome.curve.append(float(acc.reduce(loss.detach(), "mean")))
        if not outcome.curve[-1] <= ceiling:
            outcome.status = "diverged"
            outcome.message = f"loss {outcome.curve[-1]:.3g} at step {step} of {steps}, above 2 ln(vocabulary) = {ceiling:.3g}"
            return outcome
        acc.backward(loss)
        acc.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        opt.step()
        opt.zero_grad()
        progress((step + 1) / steps)
    return _judged(outcome, evaluate(model, corpus, recipe, acc), ceiling)


def _judged(outcome: Outcome, loss: float, ceiling: float) -> Outcome:
    """Put the held-out loss in; one that is not finite or above the ceiling is a divergence of the last step."""
    if loss <= ceiling:
        outcome.loss = loss
    else:
        outcome.status = "diverged"
        outcome.message = f"held-out loss {loss:.3g} after the last step, above 2 ln(vocabulary) = {ceiling:.3g}"
    return outcome


@torch.no_grad()
def evaluate(model: nn.Module, corpus: data.Corpus, recipe: Recipe, acc: Accelerator) -> float:
    """Mean held-out loss, nats per token, over the same windows for every trial."""
    batch = corpus.held_out_batch(recipe.budget.eval_tokens, recipe.data.seq_len)
    parts = zip(*(torch.from_numpy(part).to(acc.device).split(EVAL_ROWS) for part in batch), strict=True)
    return sum(float(model(inputs, targets)) * len(inputs) for inputs, targets in parts) / len(batch[0])


def trial(
    recipe: Recipe, sweep: str, acc: Accelerator, progress: Callable[[float], None] = lambda share: None
) -> tuple[Trial, list[float]]:
    """Train a recipe's point and put it on record: (the trial, its training loss per step)."""
    corpus = data.load(recipe.data)
    began = time.perf_counter()
    outcome = train(recipe, corpus, acc, progress)
    seconds = time.perf_counter() - began
    acc.free_memory()  # Accelerate keeps every model it has prepared
    tail = outcome.curve[-max(1, len(outcome.curve) // 10) :]
    provenance = {
        "scaletune": version("scaletune"), "torch": str(torch.__version__), "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if acc.device.type == "cuda" else platform.machine(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    train_loss = sum(tail) / len(tail) if outcome.status == "done" else None
    made = Trial(
        **counting.trial_fields(recipe, sweep, corpus.vocab_size, corpus.digest),
        status=outcome.status, message=outcome.message, loss=outcome.loss, train_loss=train_loss,
        seconds=round(seconds, 3), provenance=provenance,
    )  # fmt: skip
    return made, outcome.curve
