"""Trains one trial and builds its record."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from scaletune import counting, data
from scaletune.parametrizing.model_counts import count_model
from scaletune.recipe import Recipe
from scaletune.records import Trial
from scaletune.training.loop import train, training_context
from scaletune.training.run import Outcome
from scaletune.training.run_control import UNCONTROLLED, RunControl


def run_trial(
    recipe: Recipe,
    sweep: str,
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
    control: RunControl = UNCONTROLLED,
) -> tuple[Trial, list[float]]:
    """Trains one recipe point.

    `metrics` of the record holds:

    - "seconds": time by activity ("train", "evaluate", "compile": the first step of a compiled
      model),
    - "peak_bytes": peak memory,
    - "held_out": [[tokens, loss], ...] of each evaluation,
    - "noise": see `GradientNoise.metrics`,
    - "data": how many tokens were unique and how many repeated,
    - "flops_spent": FLOPs of its steps, where a step that several horizons share is divided among
      them. The values of a sweep add up to what it cost; `flops` is the cost of the trial alone.

    Args:
        recipe: A recipe point (a recipe without axes).
        sweep: Name of the sweep, for the record.
        acc: The Accelerator of this process.
        progress: Called after each step with the share of steps done.
        control: Where held-out losses are reported on the way, and what may stop the run.

    Returns:
        The record, and the training loss of each step.
    """
    corpus = data.load(recipe.data)
    start_time = time.perf_counter()
    reset_peak_memory(acc)
    with training_context(recipe, acc):
        outcome = train(recipe, corpus, acc, progress, control)
    seconds = time.perf_counter() - start_time
    return build_record(recipe, sweep, corpus, outcome, acc, seconds), outcome.curve


def build_record(
    recipe: Recipe,
    sweep: str,
    corpus: data.Corpus,
    outcome: Outcome,
    acc: Accelerator,
    seconds: float,
    stack: int = 1,
) -> Trial:
    """The record of an outcome; `stack` is the number of trials that trained as one model."""
    last_tenth = outcome.curve[-max(1, len(outcome.curve) // 10) :]
    train_loss = sum(last_tenth) / len(last_tenth) if outcome.status == "done" else None
    counts = count_model(recipe, corpus.vocab_size, corpus.features)
    return Trial(
        **counting.trial_fields(recipe, sweep, corpus.vocab_size, corpus.digest, counts),
        status=outcome.status,
        message=outcome.message,
        loss=outcome.loss,
        train_loss=train_loss,
        seconds=round(seconds, 3),
        provenance=_provenance(recipe, acc, stack) | outcome.trunk,
        metrics=_metrics(outcome, recipe, corpus, acc, counts),
    )


def _provenance(recipe: Recipe, acc: Accelerator, stack: int) -> dict[str, Any]:
    on_gpu = acc.device.type == "cuda"
    return {
        "scaletune": version("scaletune"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "processes": acc.num_processes,
        "accumulation": recipe.engine.accumulation,
        "stack": stack,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _metrics(
    outcome: Outcome,
    recipe: Recipe,
    corpus: data.Corpus,
    acc: Accelerator,
    counts: counting.ModelCounts,
) -> dict[str, Any]:
    budget, seq_len = recipe.budget, recipe.data.seq_len
    source = {} if recipe.model.family != "own" else {"flops_from": counts.flops_from}
    return source | {
        "seconds": {name: round(spent, 3) for name, spent in outcome.seconds.items()},
        "peak_bytes": _peak_memory(acc),
        "held_out": outcome.held_out,
        "noise": outcome.noise.metrics(seq_len),
        "flops_spent": counts.flops_per_token * (outcome.steps_spent * budget.batch_tokens),
        "data": corpus.data_usage(budget.tokens, budget.batch_tokens, seq_len),
    }


def reset_peak_memory(acc: Accelerator) -> None:
    """Resets the peak memory, so that each trial of a process has its own peak."""
    if acc.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)  # returns the memory that the last trial freed
        # Some kernels forbid it. The peak is then that of the process.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(acc: Accelerator) -> int:
    """Peak bytes: of tensors on a GPU, else resident memory, which includes imported libraries."""
    if acc.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
