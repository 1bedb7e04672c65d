"""Measures trial-steps per second of quickstart-size proxies: stacked and compiled, or one by one.

The methods take turns, round by round. A rate is trials * steps over the seconds that the trials'
records report for the steps, without start-up, evaluation and compilation. Tables:
benchmarks/README.md. There are three tables:

- Default: the reference is one process with two threads that trains trial by trial, eager. Against
  it: the engine's workers (one per core, one thread each) with single trials or stacks, eager and
  compiled.
- `--core`: stacks of each size in one process on one thread, in CPU time. On a busy machine only
  this table is meaningful.
- With a GPU: width 128 and 2048 tokens per step, TF32 and bf16, wall clock from an idle GPU to an
  idle GPU. Two references, both trial by trial: the eager loop, and a compiled step captured as one
  CUDA graph (a stack of one). Against them: stacks of 1, 4, 16 and 64 with one update and one
  graph, eager and compiled. `--toy` runs this code at a toy size, on a CPU without graphs: its
  figures mean nothing.

    python benchmarks/stacked_steps.py [--core] [--toy] [--width 32 64 128] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from scaletune import data, sweeping, training
from scaletune.counting import stacks
from scaletune.optim import fused_stack
from scaletune.recipe import Recipe, validate_recipe
from scaletune.sweeping.engines.local import (
    MALLOC_SETTINGS,
    LocalPool,
    count_workers,
    worker_environment,
)
from scaletune.training import loop, onednn_matmul
from scaletune.training.stacked_loop import Stack

SEQ_LEN, STEPS, ROUNDS = 64, 200, 5
Method = Callable[[], float]  # trains the trials of a round; returns trial-steps per second
HEADER = "| width | method | trial-steps/s | ratio (quartiles) |\n|---|---|---|---|"


def recipe(
    width: int,
    lr: float,
    *,
    steps: int = STEPS,
    batch_tokens: int = 512,
    precision: str = "float32",
    **engine: object,
) -> Recipe:
    values = {
        "model": {"width": width},
        "parametrization": {"base_width": 32, "init_std": 0.125},
        "optimizer": {"lr": lr},
        "training": {"precision": precision},
        "data": {"seq_len": SEQ_LEN},
        "engine": engine,
        "budget": {
            "tokens": steps * batch_tokens,
            "batch_tokens": batch_tokens,
            "eval_tokens": SEQ_LEN,
        },
    }
    return validate_recipe(values, "steps")


def rates(count: int) -> list[float]:
    """Learning rates well below the edge of stability, so that no trial diverges."""
    return [1e-3 * 4 ** (i / count) for i in range(count)]


def without_onednn(method: Method) -> Method:
    """The same method with torch's default matmul library (MKL) instead of oneDNN."""

    def run() -> float:
        with mock.patch.object(onednn_matmul, "applies", lambda *_: False):
            return method()

    return run


def one_by_one(width: int) -> Method:
    """Trains trial by trial in this process."""
    acc = training.accelerator()

    def run() -> float:
        trial, curve = training.run_trial(recipe(width, 1e-3), "main", acc)
        return len(curve) / trial.metrics["seconds"]["train"]

    return run


def engine(pool: LocalPool, width: int, trials: int, **settings: object) -> Method:
    """Trains with all workers of the pool at once."""
    tasks = sweeping.tasks("main", [recipe(width, lr, **settings) for lr in rates(trials)])

    def run() -> float:
        queue, seconds = list(tasks), []
        while queue or pool.busy:
            pool.hand_out(queue)
            for _, message in pool.messages():
                assert message is not None, pool.last_words
                if "trial" in message:
                    seconds.append(message["trial"]["metrics"]["seconds"]["train"])
        return len(pool.workers) * trials * STEPS / sum(seconds)

    return run


def alternate(methods: dict[str, Method], rounds: int) -> dict[str, tuple[float, list[float]]]:
    """{name: (rate, quartiles of its ratio to the first method)}; the rate is a median over rounds.

    One more round before them warms up.
    """
    for run in methods.values():
        run()
    results: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            results[name].append(run())
    first = next(iter(results.values()))
    ratios = {
        name: [a / b for a, b in zip(column, first, strict=True)]
        for name, column in results.items()
    }
    return {
        name: (statistics.median(column), statistics.quantiles(ratios[name], n=4))
        for name, column in results.items()
    }


def print_rows(label: str, results: dict[str, tuple[float, list[float]]], second: str = "") -> None:
    """One row per method, with the ratio to a second reference if one is named."""
    for name, (rate, (low, middle, high)) in results.items():
        last = f" {rate / results[second][0]:.2f} |" if second else ""
        print(
            f"| {label} | {name} | {rate:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |{last}",
            flush=True,
        )


def on_cores(widths: Sequence[int], rounds: int) -> None:
    """The table of the engine's workers."""
    workers = count_workers("auto")
    torch.set_num_threads(workers)
    print(f"{workers} cores, torch {torch.__version__}, depth 2, 512 tokens per step;")
    print(f"{rounds} alternated rounds, load {os.getloadavg()[0]:.1f}\n\n{HEADER}")
    with LocalPool(workers) as pool:
        for width in widths:
            size = stacks.stack_size(recipe(width, 1e-3))
            trials = workers * max(size, 2)
            reference = f"one process, {workers} threads, trial by trial, MKL"
            single, stacked = f"{workers} workers, trial by trial", f"stacks of {size}"
            methods = {
                reference: without_onednn(one_by_one(width)),
                single: engine(pool, width, trials, stack=1),
                f"{workers} workers, default ({stacked})": engine(pool, width, trials),
                f"{single}, compiled": engine(pool, width, trials, stack=1, compile=True),
                f"{workers} workers, {stacked}, compiled": engine(
                    pool, width, trials, compile=True
                ),
            }
            if size == 1:
                methods = {name: run for name, run in methods.items() if "stacks of" not in name}
            print_rows(str(width), alternate(methods, rounds))


def on_one_core(widths: Sequence[int], rounds: int) -> None:
    """Stacks of each size in this process, eager and compiled; CPU time of one thread."""
    torch.set_num_threads(1)
    acc = training.accelerator()
    print(f"one thread, CPU time, torch {torch.__version__}, depth 2, 512 tokens per step;")
    print(f"{rounds} alternated rounds\n\n{HEADER}")
    for width in widths:
        reference = without_onednn(steps_of(width, 1, acc, 32, stacked=False))
        methods = {"trial by trial, MKL": reference}
        for compiled, size in itertools.product((False, True), (1, 2, 4, 8)):
            name = f"stacks of {size}" if size > 1 else "trial by trial"
            name += ", compiled" if compiled else ""
            methods[name] = steps_of(width, size, acc, 32, stacked=size > 1, compile=compiled)
        print_rows(str(width), alternate(methods, rounds))
        acc.free_memory()
        torch.compiler.reset()


def on_gpu(width: int, sizes: Sequence[int], batch_tokens: int, count: int, rounds: int) -> None:
    """The table of a GPU. TF32 is float32 with TF32 matrix products."""
    torch.set_float32_matmul_precision("high")
    acc = training.accelerator()
    device = "CPU at a toy size, figures mean nothing"
    if acc.device.type == "cuda":
        device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, width {width}, depth 2,")
    print(f"{batch_tokens} tokens per step; {rounds} alternated rounds\n")
    print("| precision | method | trial-steps/s | against eager (quartiles) ", end="")
    print("| against compiled, one graph |\n" + "|---" * 5 + "|")
    second = "trial by trial, compiled, one graph"
    for name, precision in (("TF32", "float32"), ("bf16", "bf16")):
        settings = {"batch_tokens": batch_tokens, "precision": precision}
        methods = {
            "trial by trial": steps_of(width, 1, acc, count, stacked=False, **settings),
            second: steps_of(width, 1, acc, count, compile=True, **settings),
        }
        for compiled, size in itertools.product((False, True), sizes):
            if (size, compiled) != (1, True):  # the second reference
                how = f"stack of {size}, one graph{', compiled' if compiled else ''}"
                methods[how] = steps_of(width, size, acc, count, compile=compiled, **settings)
        print_rows(name, alternate(methods, rounds), second)
        acc.free_memory()
        torch.compiler.reset()


def steps_of(
    width: int, size: int, acc: Accelerator, count: int, *, stacked: bool = True, **settings: Any
) -> Method:
    """`count` trial-steps or more per round, as the training loop takes them.

    With `stacked` a single trial is trained as a stack of one too.
    """
    points = [recipe(width, lr, steps=10**5, **settings) for lr in rates(size)]
    runs = [loop.start_run(point, data.load(point.data), acc) for point in points]
    step = Stack(runs).update if stacked else lambda: loop.update(runs[0])
    cuda = acc.device.type == "cuda"

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    def run() -> float:
        # On a GPU losses are read every 16 steps.
        steps = max(16 if cuda else 4, count // len(runs))
        with onednn_matmul.use_onednn(points[0], acc.device):
            start = clock()
            for _ in range(steps):
                step()
                for each in runs:
                    loop.finish_step(each, lambda values, step: None)
            return len(runs) * steps / (clock() - start)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument(
        "--core",
        action="store_true",
        help="stack sizes on one thread, in CPU time, which other work hardly affects",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--toy", action="store_true", help="run the code of the GPU table at a toy size"
    )
    args = parser.parse_args()
    if args.toy:
        fused_stack.DEVICES = ("cpu", "cuda")  # one update for the whole stack on a CPU too
        on_gpu(32, (1, 2), 128, 4, 2)
    elif torch.cuda.is_available():
        on_gpu(128, (1, 4, 16, 64), 2048, 512, args.rounds)
    elif args.core:
        # The malloc settings of a worker take effect only when a process starts.
        if not MALLOC_SETTINGS.items() <= os.environ.items():
            os.execve(sys.executable, [sys.executable, *sys.argv], worker_environment(0))
        on_one_core(args.width, args.rounds)
    else:
        on_cores(args.width, args.rounds)


if __name__ == "__main__":
    main()
