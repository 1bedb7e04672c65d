"""The training loop of one trial: `train`, and the functions that stacked training also uses.

A step sets the learning rates, computes the gradient of its batch, clips it, moves the optimizer
and updates the average of the weights. Losses stay on the device until they are read, because each
read makes the host wait.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scaletune import data, optim
from scaletune.errors import UserError
from scaletune.models.own import OwnModel, own_draws
from scaletune.parametrizing.recipe_model import build_planned, check_forward
from scaletune.recipe import Recipe, trial_id
from scaletune.rules import TensorPlan
from scaletune.training import checkpoints, gradients, onednn_matmul, sharding, trackers
from scaletune.training.evaluation import evaluate
from scaletune.training.processes import require_plain
from scaletune.training.run import Outcome, TrainingRun
from scaletune.training.run_control import UNCONTROLLED, RunControl

READ_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between reads of the losses, by device type."""


def start_run(recipe: Recipe, corpus: data.Corpus, acc: Accelerator) -> TrainingRun:
    """Builds the model, plan, optimizer and schedule of a trial.

    UserError unless there are `engine.processes` processes.
    """
    if acc.num_processes != recipe.engine.processes:
        raise UserError(
            "`engine.processes` must be the number of processes that run,"
            f" but got {recipe.engine.processes} and {acc.num_processes} run"
        )
    require_plain(acc)
    net, plan = build_model(recipe, corpus)
    model = prepare_model(net, recipe, acc)
    return TrainingRun(
        recipe=recipe,
        corpus=corpus,
        acc=acc,
        plan=plan,
        net=net,
        opt=optim.optimizer(net, plan, recipe.optimizer),
        schedule=optim.resolve_schedule(recipe.schedule, recipe.budget),
        ema=optim.weight_average(net, recipe.schedule, recipe.budget),
        accumulator=gradients.GradientAccumulator(
            compile_model(model, acc) if recipe.engine.compile else model, net, recipe.training, acc
        ),
        id=trial_id(recipe, corpus.digest),
    )


def build_model(recipe: Recipe, corpus: data.Corpus) -> tuple[nn.Module, list[TensorPlan]]:
    """The initialised model of a trial and the plan of its tensors.

    UserError if the forward of a user's module does not give the logits of two rows.
    """
    planned = build_planned(recipe, corpus.vocab_size, text=not corpus.features)
    if isinstance(planned.net, OwnModel):
        rows = corpus.held_out_batch(2 * recipe.data.seq_len, recipe.data.seq_len)
        check_forward(planned.net, *(torch.from_numpy(part[:2]) for part in rows))
    return planned.net, planned.plan


def prepare_model(net: nn.Module, recipe: Recipe, acc: Accelerator) -> nn.Module:
    """Moves the model to the device; the model that trains over several processes.

    That is the model itself, sharded, or a wrapper that averages its gradients. An optimizer must
    be created afterwards, because sharding replaces the parameters.
    """
    if recipe.engine.strategy == "fsdp":
        sharding.shard_model(net, acc)
        return net
    return acc.prepare(net)


def compile_model(model: nn.Module, acc: Accelerator) -> Callable[..., Tensor]:
    """The model, compiled by torch.compile; UserError if the machine has no compiler for it."""
    if acc.device.type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    ):
        raise UserError(
            "`engine.compile` needs a C++ compiler to train on a CPU,"
            " but neither g++ nor clang++ is on the path"
        )
    return torch.compile(model)


@contextmanager
def training_context(recipe: Recipe, acc: Accelerator) -> Iterator[None]:
    """Train inside this context: it uses faster matrix products and frees memory at the end.

    One process trains hundreds of trials, so nothing of a trial may stay in memory.
    """
    try:
        with onednn_matmul.use_onednn(recipe, acc.device):
            yield
    finally:
        acc.free_memory()  # Accelerate keeps every model that it has prepared
        if recipe.engine.compile:
            torch.compiler.reset()  # torch.compile keeps every graph, up to a limit per function


def train(
    recipe: Recipe,
    corpus: data.Corpus,
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
    control: RunControl = UNCONTROLLED,
) -> Outcome:
    """Trains one recipe point.

    With `engine.checkpoint_every`, training continues from the checkpoint of an interrupted run of
    the same trial. On a CPU the result is then bitwise the same as without the interruption.

    Args:
        recipe: A recipe point (a recipe without axes).
        corpus: The data, from `scaletune.data.load`.
        acc: The Accelerator of this process.
        progress: Called after each step with the share of steps done.
        control: Where held-out losses are reported on the way, and what may stop the run.

    Returns:
        The outcome. A loss that is not finite or above 2 ln(vocabulary) gives status "diverged".
    """
    run = start_run(recipe, corpus, acc)
    run.control = control
    with trackers.open_trackers(run) as track:
        begin(run, track)
        while run.active:
            update(run)
            finish_step(run, track)
            progress(run.step / run.steps)
        finish(run, track)
    return run.outcome


def begin(run: TrainingRun, track: trackers.Track) -> None:
    """Restores a checkpoint, or evaluates the untrained model, if the recipe requests it."""
    checkpoints.restore(run)
    report_earlier(run)
    evaluate_untrained(run, track)


def report_earlier(run: TrainingRun) -> None:
    """Reports the held-out losses that a checkpoint holds, as the earlier run did."""
    for tokens, loss in run.outcome.held_out:
        run.control.report(run.id, tokens, loss)


def evaluate_untrained(run: TrainingRun, track: trackers.Track) -> None:
    """Evaluates at step 0 if `engine.evaluate_at` contains 0."""
    if 0 in run.evaluations and not run.step:
        _evaluate_held_out(run, track)


def finish(run: TrainingRun, track: trackers.Track) -> None:
    """Evaluates the held-out loss of a trial that has neither diverged nor been stopped."""
    if run.healthy:
        run.outcome.loss = _evaluate_held_out(run, track)


def finish_step(run: TrainingRun, track: trackers.Track) -> None:
    """Reads the losses, evaluates and saves a checkpoint, each if it is due at this step."""
    evaluates, saves = run.step in run.evaluations, _is_checkpoint_step(run)
    is_full = len(run.unread_losses) >= READ_EVERY.get(run.acc.device.type, 1)
    if evaluates or saves or is_full or run.step == run.steps:
        read_losses(run, track)
    if evaluates and run.healthy:
        _evaluate_held_out(run, track)
    if saves and run.healthy:
        checkpoints.save(run)


def _is_checkpoint_step(run: TrainingRun) -> bool:
    """Every `engine.checkpoint_every` steps, and the last step."""
    every = run.recipe.engine.checkpoint_every
    return every > 0 and (run.step % every == 0 or run.step == run.steps)


def update(run: TrainingRun) -> None:
    """One optimizer step. Its loss stays unread."""
    start_time = time.perf_counter()
    set_learning_rates(run)
    train_on_batch(run, run.step)
    update_average(run)
    record_step(run, time.perf_counter() - start_time)


def record_step(run: TrainingRun, seconds: float) -> None:
    """Records a step for the run and its branches, which share its time equally.

    The first step of a compiled model counts as compile time.
    """
    runs = [run, *run.branches]
    for each in runs:
        compiling = each.recipe.engine.compile and not each.outcome.seconds["compile"]
        each.outcome.seconds["compile" if compiling else "train"] += seconds / len(runs)
        each.outcome.steps_spent += 1 / len(runs)
    for branch in run.branches:
        branch.unread_losses.append(run.unread_losses[-1])
        branch.outcome.trunk = {
            "trunk": run.id,
            "trunk_tokens": branch.step * branch.recipe.budget.batch_tokens,
        }


def set_learning_rates(run: TrainingRun) -> None:
    """Sets the learning rates of the next step; UserError if they are not in the plan's ratios.

    The schedule is evaluated in the middle of the step's tokens, so no step has a learning rate of
    0. The ratios are checked at the first step, after warmup and at the last step.
    """
    step, steps, warmup = run.step, run.steps, run.recipe.schedule.warmup_tokens
    # Bitwise the same for every horizon, which `step / steps` is not.
    warmup_share = (step + 0.5) * run.recipe.budget.batch_tokens / warmup if warmup else None
    optim.set_learning_rates(run.opt, run.schedule, (step + 0.5) / steps, warmup_share)
    if step in (0, min(steps - 1, math.ceil(run.schedule.warmup * steps)), steps - 1):
        optim.guard(run.opt, run.plan, f"at step {step} of {steps}")


def update_average(run: TrainingRun) -> None:
    """Updates the moving average of the weights, if there is one."""
    if run.ema:
        run.ema.update_parameters(run.net)


def load_batch(run: TrainingRun, step: int) -> list[gradients.MicroBatch]:
    """This process's micro-batches of a step."""
    recipe = run.recipe
    rows = recipe.budget.batch_tokens // recipe.data.seq_len
    batch = run.corpus.batch(recipe.seed, step, rows, recipe.data.seq_len)
    return gradients.micro_batches(batch, run.acc, recipe.engine.accumulation)


def train_on_batch(run: TrainingRun, step: int) -> None:
    """Computes the gradient of the batch of `step` and moves the optimizer."""
    batch, every = load_batch(run, step), run.recipe.engine.noise_every
    with own_draws(run.net, run.acc.device, run.recipe.seed, step, run.acc.process_index):
        run.unread_losses.append(
            run.accumulator.backward_and_measure_noise(batch, run.outcome.noise)
            if every and step % every == 0
            else run.accumulator.backward(batch)
        )
    apply_gradients(run)


def apply_gradients(run: TrainingRun) -> None:
    """Clips the gradient and moves the optimizer."""
    nn.utils.clip_grad_norm_(run.parameters, run.recipe.optimizer.clip)
    loss = run.unread_losses[-1].reshape(1)
    run.opt.step(lambda: loss)  # type: ignore[arg-type, return-value]  # MoMo reads the loss
    run.opt.zero_grad()


def read_losses(run: TrainingRun, track: trackers.Track) -> None:
    """Reads the losses from the device (the mean over processes) and logs them.

    The curve ends at the first loss that shows a divergence, or here if the run is to stop.
    """
    start_time = time.perf_counter()
    # The request is read with the losses: all processes then stop at the same step.
    request = run.unread_losses[0].new_tensor([float(run.control.stop_requested(run.id))])
    losses = torch.cat([torch.stack(run.unread_losses), request])
    run.unread_losses.clear()
    *values, stops = (
        run.acc.reduce(losses, "mean") if run.acc.num_processes > 1 else losses
    ).tolist()
    for loss in values:
        step, curve = len(run.outcome.curve), run.outcome.curve
        curve.append(loss)
        track({"train/loss": loss}, step)
        if not loss <= run.max_loss:
            event = f"loss {loss:.3g} at step {step} of {run.steps}"
            run.outcome.mark_diverged(_describe_divergence(loss, event, curve[:-1], run))
            break
    if stops and run.active:
        run.outcome.mark_stopped(run.tokens)
    run.outcome.seconds["train"] += time.perf_counter() - start_time


def _describe_divergence(
    loss: float, event: str, earlier_losses: list[float], run: TrainingRun
) -> str:
    """One sentence: what diverged, when, by which criterion, and the last loss before it."""
    rule = f"above 2 ln(vocabulary) = {run.max_loss:.3g}" if math.isfinite(loss) else "not finite"
    if earlier_losses:
        last, step = earlier_losses[-1], len(earlier_losses) - 1
        return f"{event}, {rule}; last good loss {last:.4g} at step {step}"
    cause = "`init_std` or a multiplier"
    if run.recipe.keeps_own_init:
        cause = "the module's own initialisation (`parametrization.init_std` replaces it)"
    return (
        f"{event}, {rule}, before any update: {cause} is too large for"
        f" {run.recipe.training.precision}, or the data is not finite"
    )


def _evaluate_held_out(run: TrainingRun, track: trackers.Track) -> float | None:
    """The held-out loss, of the averaged weights if there are any.

    None, and status "diverged", if it is not finite or above the maximum.
    """
    start_time = time.perf_counter()
    with optim.evaluation_weights(run.net, run.opt, run.ema):
        loss = evaluate(run.net, run.corpus, run.recipe, run.acc)
    run.outcome.seconds["evaluate"] += time.perf_counter() - start_time
    if not loss <= run.max_loss:
        when = "the last step" if run.step == run.steps else f"step {run.step} of {run.steps}"
        event = f"held-out loss {loss:.3g} after {when}"
        run.outcome.mark_diverged(_describe_divergence(loss, event, run.outcome.curve, run))
        return None
    track({"held_out/loss": loss}, run.step)
    run.outcome.held_out.append([run.tokens, loss])
    if run.active:
        run.control.report(run.id, run.tokens, loss)
    return loss
