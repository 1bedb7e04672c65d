"""Trial-steps a second of quickstart-size proxies: as the local engine runs them, beside the same trials one after another.

`python benchmarks/stacked_steps.py` alternates them round by round. The yardstick is one process with two threads that trains trial by
trial, eager; against it the engine's own workers (one a core, one thread each), given trials one by one or in stacks, eager and compiled.
A rate is trials * steps over the seconds that their records say the steps took: neither start-up, evaluation nor compilation is in it.
`--core` compares stacks of each size in one process on one thread, in CPU time: on a busy machine, the table that means something.
With a GPU: width 128 and 2048 tokens a step, in TF32 and bf16, by the wall clock, from an idle GPU to an idle GPU. Two yardsticks, trial by
trial: eager as the loop is, and compiled with its whole step as one CUDA graph (a stack of one); against them stacks of 1, 4, 16 and 64 with
one update and one graph, eager kernels and compiled. `--toy` runs that table's code at a toy size, on a CPU without graphs: its figures mean
nothing.
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
from scaletune.recipe import Recipe, validated
from scaletune.sweeping.engines.local import HEAP, Pool, environment, slots
from scaletune.training import loop, onednn_matmul
from scaletune.training.stacked_loop import Stack

SEQ_LEN, STEPS, ROUNDS = 64, 200, 5
Way = Callable[[], float]  # trains a round's trials; trial-steps a second


def recipe(
    width: int,
    lr: float,
    *,
    steps: int = STEPS,
    batch_tokens: int = 512,
    precision: str = "float32",
    **engine: object,
) -> Recipe:
    return validated(
        {
            "model": {"width": width}, "parametrization": {"base_width": 32, "init_std": 0.125}, "optimizer": {"lr": lr},
            "training": {"precision": precision}, "data": {"seq_len": SEQ_LEN}, "engine": engine,
            "budget": {"tokens": steps * batch_tokens, "batch_tokens": batch_tokens, "eval_tokens": SEQ_LEN},
        },
        "steps",
    )  # fmt: skip


def rates(count: int) -> list[float]:
    """Learning rates well below the edge of stability: every trial takes all its steps."""
    return [1e-3 * 4 ** (i / count) for i in range(count)]


def as_torch_comes(go: Way) -> Way:
    """The same with products by torch's own choice of library, as in a loop that knows nothing of `training.multiplying`."""

    def gone() -> float:
        with mock.patch.object(onednn_matmul, "applies", lambda *_: False):
            return go()

    return gone


def one_by_one(width: int) -> Way:
    """The yardstick, but for its products: this process, two threads."""
    acc = training.accelerator()

    def go() -> float:
        trial, curve = training.trial(recipe(width, 1e-3), "main", acc)
        return len(curve) / trial.metrics["seconds"]["train"]

    return go


def engine(pool: Pool, width: int, trials: int, **settings: object) -> Way:
    """The pool's workers, all busy at once."""
    tasks = sweeping.tasks("main", [recipe(width, lr, **settings) for lr in rates(trials)])

    def go() -> float:
        queue, seconds = list(tasks), []
        while queue or pool.busy:
            pool.hand_out(queue)
            for _, message in pool.messages():
                assert message is not None, pool.last_words
                if "trial" in message:
                    seconds.append(message["trial"]["metrics"]["seconds"]["train"])
        return len(pool.workers) * trials * STEPS / sum(seconds)

    return go


def alternated(ways: dict[str, Way], rounds: int) -> dict[str, tuple[float, list[float]]]:
    """{name: (rate, quartiles of its ratio to the first one's)}, medians over rounds; a round before them warms up."""
    for go in ways.values():
        go()
    found = {name: [] for name in ways}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, go in ways.items():
            found[name].append(go())
    first = next(iter(found.values()))
    ratios = {
        name: [a / b for a, b in zip(column, first, strict=True)] for name, column in found.items()
    }
    return {
        name: (statistics.median(column), statistics.quantiles(ratios[name], n=4))
        for name, column in found.items()
    }


def show(what: str, found: dict[str, tuple[float, list[float]]], second: str = "") -> None:
    """A row each; with the ratio of its rate to another's, where a second yardstick is named."""
    for name, (rate, (low, middle, high)) in found.items():
        beside = f" {rate / found[second][0]:.2f} |" if second else ""
        print(
            f"| {what} | {name} | {rate:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |{beside}",
            flush=True,
        )


def on_cores(widths: Sequence[int], rounds: int) -> None:
    workers = slots("auto")
    torch.set_num_threads(workers)
    print(
        f"{workers} cores, torch {torch.__version__}, depth 2, 512 tokens a step; {rounds} alternated rounds, load {os.getloadavg()[0]:.1f}"
    )
    print("| width | how | trial-steps/s | ratio (quartiles) |\n|---|---|---|---|")
    with Pool(workers) as pool:
        for width in widths:
            size = stacks.size(recipe(width, 1e-3))
            trials = workers * max(size, 2)
            ways = {
                f"one process, {workers} threads, trial by trial": as_torch_comes(
                    one_by_one(width)
                ),
                f"{workers} workers, trial by trial": engine(pool, width, trials, stack=1),
                f"{workers} workers, as they come (stacks of {size})": engine(pool, width, trials),
                f"{workers} workers, trial by trial, compiled": engine(
                    pool, width, trials, stack=1, compile=True
                ),
                f"{workers} workers, stacks of {size}, compiled": engine(
                    pool, width, trials, compile=True
                ),
            }
            show(
                str(width),
                alternated(
                    {name: go for name, go in ways.items() if size > 1 or "stacks of" not in name},
                    rounds,
                ),
            )


def on_one_core(widths: Sequence[int], rounds: int) -> None:
    """Stacks of each size in this process, eager and compiled, on one thread's CPU clock."""
    torch.set_num_threads(1)
    acc = training.accelerator()
    print(
        f"one thread, CPU time, torch {torch.__version__}, depth 2, 512 tokens a step; {rounds} alternated rounds"
    )
    print("| width | how | trial-steps/s | ratio (quartiles) |\n|---|---|---|---|")
    for width in widths:
        ways = {
            "trial by trial, products as torch comes": as_torch_comes(
                steps_of(width, 1, acc, 32, stacked=False)
            )
        }
        for compiled, size in itertools.product((False, True), (1, 2, 4, 8)):
            how = f"{'stacks of ' + str(size) if size > 1 else 'trial by trial'}{', compiled' if compiled else ''}"
            ways[how] = steps_of(width, size, acc, 32, stacked=size > 1, compile=compiled)
        show(str(width), alternated(ways, rounds))
        acc.free_memory()
        torch.compiler.reset()


def on_gpu(width: int, sizes: Sequence[int], batch_tokens: int, count: int, rounds: int) -> None:
    """The table of a GPU; TF32 is float32 with its products so rounded."""
    torch.set_float32_matmul_precision("high")
    acc = training.accelerator()
    device = (
        torch.cuda.get_device_name() if acc.device.type == "cuda" else "a toy on a CPU: no figures"
    )
    print(
        f"{device}, torch {torch.__version__}, width {width}, depth 2, {batch_tokens} tokens a step; {rounds} alternated rounds"
    )
    print(
        "| precision | how | trial-steps/s | against eager (quartiles) | against compiled, one graph |\n|---|---|---|---|---|"
    )
    for name, precision in (("TF32", "float32"), ("bf16", "bf16")):
        asked = {"batch_tokens": batch_tokens, "precision": precision}
        ways = {
            "trial by trial": steps_of(width, 1, acc, count, stacked=False, **asked),
            "trial by trial, compiled, one graph": steps_of(
                width, 1, acc, count, compile=True, **asked
            ),
        }
        for compiled, size in itertools.product((False, True), sizes):
            if (size, compiled) != (1, True):  # the second yardstick
                how = f"stack of {size}, one graph{', compiled' if compiled else ''}"
                ways[how] = steps_of(width, size, acc, count, compile=compiled, **asked)
        show(name, alternated(ways, rounds), "trial by trial, compiled, one graph")
        acc.free_memory()
        torch.compiler.reset()


def steps_of(
    width: int, size: int, acc: Accelerator, count: int, *, stacked: bool = True, **asked: Any
) -> Way:
    """`count` trial-steps or more a round, as the loop takes them; `stacked`: as a stack, of one trial too."""
    points = [recipe(width, lr, steps=10**5, **asked) for lr in rates(size)]
    runs = [loop.start(point, data.load(point.data), acc) for point in points]
    step = Stack(runs).update if stacked else lambda: loop.update(runs[0])
    cuda = acc.device.type == "cuda"

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    def go() -> float:
        steps = max(16 if cuda else 4, count // len(runs))  # a GPU looks at its losses every 16
        with onednn_matmul.quick(points[0], acc.device):
            began = clock()
            for _ in range(steps):
                step()
                for run in runs:
                    loop.after(run, lambda values, step: None)
            return len(runs) * steps / (clock() - began)

    return go


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument(
        "--core",
        action="store_true",
        help="stack sizes on one thread, in CPU time, which other work does not touch",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--toy", action="store_true", help="the GPU's table at a toy size, to see that it works"
    )
    asked = parser.parse_args()
    if asked.toy:
        fused_stack.DEVICES = ("cpu", "cuda")  # one update on a CPU too
        on_gpu(32, (1, 2), 128, 4, 2)
    elif torch.cuda.is_available():
        on_gpu(128, (1, 4, 16, 64), 2048, 512, asked.rounds)
    elif asked.core:
        if (
            not HEAP.items() <= os.environ.items()
        ):  # a worker's environment is read when a process starts
            os.execve(sys.executable, [sys.executable, *sys.argv], environment(0))
        on_one_core(asked.width, asked.rounds)
    else:
        on_cores(asked.width, asked.rounds)


if __name__ == "__main__":
    main()
