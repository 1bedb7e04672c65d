"""A trial and its record."""

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
from scaletune.recipe import Recipe
from scaletune.records import Trial
from scaletune.training.loop import Outcome, released, train


def trial(
    recipe: Recipe,
    sweep: str,
    acc: Accelerator,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Trial, list[float]]:
    """Train a recipe's point and put it on record: (the trial, its training loss per step).

    `metrics`: "seconds" by what they went to ("compile" is the first step of a compiled model), "peak_bytes", "held_out" [[tokens, loss],
    ...], "noise" as `Noise.metrics` says, "data": unique and repeated tokens, "flops_spent": of the steps it took, a step that served
    several horizons shared among them, so that a sweep's add up to what it spent; `flops` is what the trial takes alone.
    """
    corpus = data.load(recipe.data)
    began = time.perf_counter()
    forget_peak(acc)
    with released(recipe, acc):
        outcome = train(recipe, corpus, acc, progress)
    return record(recipe, sweep, corpus, outcome, acc, time.perf_counter() - began), outcome.curve


def record(
    recipe: Recipe,
    sweep: str,
    corpus: data.Corpus,
    outcome: Outcome,
    acc: Accelerator,
    seconds: float,
    stack: int = 1,
) -> Trial:
    """What a loop left behind, as a record; `stack`: trials that were one model, this one among them."""
    tail = outcome.curve[-max(1, len(outcome.curve) // 10) :]
    train_loss = sum(tail) / len(tail) if outcome.status == "done" else None
    return Trial(
        **counting.trial_fields(recipe, sweep, corpus.vocab_size, corpus.digest),
        status=outcome.status, message=outcome.message, loss=outcome.loss, train_loss=train_loss,
        seconds=round(seconds, 3), provenance=_provenance(recipe, acc, stack) | outcome.trunk,
        metrics=_metrics(outcome, recipe, corpus, acc),
    )  # fmt: skip


def _provenance(recipe: Recipe, acc: Accelerator, stack: int) -> dict[str, Any]:
    return {
        "scaletune": version("scaletune"), "torch": str(torch.__version__), "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if acc.device.type == "cuda" else platform.machine(),
        "processes": acc.num_processes, "accumulation": recipe.engine.accumulation, "stack": stack,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _metrics(
    outcome: Outcome, recipe: Recipe, corpus: data.Corpus, acc: Accelerator
) -> dict[str, Any]:
    return {
        "seconds": {name: round(spent, 3) for name, spent in outcome.seconds.items()},
        "peak_bytes": _peak(acc),
        "held_out": outcome.held_out,
        "noise": outcome.noise.metrics(recipe.data.seq_len),
        "flops_spent": counting.flops_per_token(
            recipe.model, corpus.vocab_size, recipe.data.seq_len
        )
        * (outcome.spent * recipe.budget.batch_tokens),
        "data": corpus.seen(recipe.budget.tokens, recipe.budget.batch_tokens, recipe.data.seq_len),
    }


def forget_peak(acc: Accelerator) -> None:
    """Start the measure of memory anew, so that one process's trials have each their own."""
    if acc.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)  # what the last trial freed
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # a kernel that forbids it: the peak is the process's


def _peak(acc: Accelerator) -> int:
    """Bytes at most held: of the GPU by tensors, else resident, the imported libraries included."""
    if acc.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
