"""Trial-steps a second of quickstart-size proxies: as the local engine runs them, beside the same trials one after another.

`python benchmarks/stacked_steps.py` alternates them round by round. The yardstick is one process with two threads that trains trial by
trial, eager; against it the engine's own workers (one a core, one thread each), given trials one by one or in stacks, eager and compiled.
A rate is trials * steps over the seconds that their records say the steps took: neither start-up, evaluation nor compilation is in it.
`--core` compares stacks of each size in one process on one thread, in CPU time: on a busy machine, the table that means something.
With a GPU it is that table, of width 128 and 2048 tokens a step, in TF32 and bf16, by the wall clock.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from scaletune import data, sweeping, training
from scaletune.counting import stacking
from scaletune.recipe import Recipe, validated
from scaletune.sweeping.local import HEAP, Pool, environment, slots
from scaletune.training import loop
from scaletune.training.stacking import Stack

SEQ_LEN, STEPS, ROUNDS = 64, 200, 5
Way = Callable[[], float]  # trains a round's trials; trial-steps a second


def recipe(width: int, lr: float, *, steps: int = STEPS, batch_tokens: int = 512, precision: str = "float32", **engine: object) -> Recipe:
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
    return [1e-3 * 1.1**i for i in range(count)]


def one_by_one(width: int) -> Way:
    """The yardstick: this process, two threads."""
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
    ratios = {name: [a / b for a, b in zip(column, first, strict=True)] for name, column in found.items()}
    return {name: (statistics.median(column), statistics.quantiles(ratios[name], n=4)) for name, column in found.items()}


def show(what: str, found: dict[str, tuple[float, list[float]]]) -> None:
    for name, (rate, (low, middle, high)) in found.items():
        print(f"| {what} | {name} | {rate:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def on_cores(widths: Sequence[int], rounds: int) -> None:
    workers = slots("auto")
    torch.set_num_threads(workers)
    print(
        f"{workers} cores, torch {torch.__version__}, depth 2, 512 tokens a step; {rounds} alternated rounds, load {os.getloadavg()[0]:.1f}"
    )
    print("| width | how | trial-steps/s | ratio (quartiles) |\n|---|---|---|---|")
    with Pool(workers) as pool:
        for width in widths:
            size = stacking.size(recipe(width, 1e-3))
            trials = workers * max(size, 2)
            ways = {
                f"one process, {workers} threads, trial by trial": one_by_one(width),
                f"{workers} workers, trial by trial": engine(pool, width, trials, stack=1),
                f"{workers} workers, as they come (stacks of {size})": engine(pool, width, trials),
                f"{workers} workers, trial by trial, compiled": engine(pool, width, trials, stack=1, compile=True),
                f"{workers} workers, stacks of {size}, compiled": engine(pool, width, trials, compile=True),
            }
            show(str(width), alternated({name: go for name, go in ways.items() if size > 1 or "stacks of" not in name}, rounds))


def in_process(widths: Sequence[int], sizes: Sequence[int], precisions: Sequence[str], batch_tokens: int, rounds: int) -> None:
    """Stacks of each size in this process, eager and compiled, on one thread's CPU clock or from an idle GPU to an idle GPU."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    acc = training.accelerator()
    device = torch.cuda.get_device_name() if acc.device.type == "cuda" else "one thread, CPU time"
    print(f"{device}, torch {torch.__version__}, depth 2, {batch_tokens} tokens a step; {rounds} alternated rounds")
    print("| width, precision | how | trial-steps/s | ratio (quartiles) |\n|---|---|---|---|")
    for width, precision in itertools.product(widths, precisions):
        ways = {}
        for compiled, size in itertools.product((False, True), sizes):
            asked = dict(steps=10**4, batch_tokens=batch_tokens, precision=precision, compile=compiled)
            name = f"{'stacks of ' + str(size) if size > 1 else 'trial by trial'}{', compiled' if compiled else ''}"
            ways[name] = steps_of([recipe(width, lr, **asked) for lr in rates(size)], acc)
        show(f"{width}, {precision}", alternated(ways, rounds))
        acc.free_memory()
        torch.compiler.reset()


def steps_of(points: Sequence[Recipe], acc: Accelerator, count: int = 32) -> Way:
    """`count` trial-steps or more a round, as the loop takes them."""
    runs = [loop.start(point, data.load(point.data), acc) for point in points]
    step = Stack(runs).update if len(runs) > 1 else lambda: loop.update(runs[0])
    cuda = acc.device.type == "cuda"

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    def go() -> float:
        began, steps = clock(), max(4, count // len(runs))
        for _ in range(steps):
            step()
            for run in runs:
                loop.after(run, lambda values, step: None)
        return len(runs) * steps / (clock() - began)

    return go


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--core", action="store_true", help="stack sizes on one thread, in CPU time, which other work does not touch")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    if torch.cuda.is_available():
        in_process([128], (1, 4, 16, 64), ("float32", "bf16"), 2048, asked.rounds)
    elif asked.core:
        if not HEAP.items() <= os.environ.items():  # a worker's environment is read when a process starts
            os.execve(sys.executable, [sys.executable, *sys.argv], environment(0))
        in_process(asked.width, (1, 2, 4, 8), ("float32",), 512, asked.rounds)
    else:
        on_cores(asked.width, asked.rounds)


if __name__ == "__main__":
    main()
