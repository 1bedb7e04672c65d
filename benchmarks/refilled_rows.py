"""Measures whether rows of a stack that diverged trials leave pay when other trials take them.

Sixteen trials of a transformer, depth 2, train in stacks of 4 in one process on one thread. Every
second learning rate diverges within the first tenth of the steps. Either four stacks train one
after the other and shrink when trials diverge, or one stack is refilled from the queue. The two
take turns; both give the same losses to the last bit. CPU time. Tables: benchmarks/README.md.

    python benchmarks/refilled_rows.py [--width 32 64 128] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence

from scaletune import training
from scaletune.recipe import Recipe, validate_recipe
from scaletune.sweeping.engines.local import MALLOC_SETTINGS, worker_environment
from scaletune.training.run_control import RunControl

STEPS, STACK, TRIALS = 200, 4, 16


def points(width: int) -> list[Recipe]:
    """Trials whose learning rates are good and far too large, in turn."""
    values = {
        "model": {"width": width, "depth": 2, "head_dim": 16},
        "parametrization": {"base_width": width, "init_std": 0.05},
        "schedule": {"kind": "constant"},
        "data": {"source": "python-stdlib", "seq_len": 64},
        "budget": {"tokens": STEPS * 512, "batch_tokens": 512, "eval_tokens": 4096},
        "engine": {"stack": STACK},
    }
    rates = [0.002 * 1.1**k if k % 2 else 50.0 + k for k in range(TRIALS)]
    return [validate_recipe(values | {"optimizer": {"lr": lr}}, "bench") for lr in rates]


def train(stack: Sequence[Recipe], queue: list[Recipe]) -> dict[str, float | None]:
    """Trains a stack whose free rows are refilled from the queue; the losses by id."""

    def refill(rows: int) -> list[tuple[Recipe, str]]:
        taken = queue[:rows]
        del queue[:rows]
        return [(point, "main") for point in taken]

    acc, sweeps = training.accelerator(), ["main"] * len(stack)
    trained = training.train_stack(stack, sweeps, acc, control=RunControl(refill=refill))
    return {trial.id: trial.loss for trial, _ in trained}


def one_after_the_other(trials: list[Recipe]) -> dict[str, float | None]:
    losses: dict[str, float | None] = {}
    for start in range(0, TRIALS, STACK):
        losses |= train(trials[start : start + STACK], [])
    return losses


def refilled(trials: list[Recipe]) -> dict[str, float | None]:
    return train(trials[:STACK], trials[STACK:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not MALLOC_SETTINGS.items() <= os.environ.items():  # read by malloc when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], worker_environment(0))
    print("| width | shrinking stacks, s | refilled, s | ratio (quartiles) |\n|---|---|---|---|")
    for width in args.width:
        trials, seconds, ratios = points(width), [], []
        for _ in range(args.rounds):
            start = time.process_time()
            apart = one_after_the_other(trials)
            middle = time.process_time()
            assert refilled(trials) == apart
            seconds.append((middle - start, time.process_time() - middle))
            ratios.append(seconds[-1][0] / seconds[-1][1])
        low, mid, high = statistics.quantiles(ratios, n=4, method="inclusive")
        before, after = (statistics.median(each) for each in zip(*seconds, strict=True))
        n_done = sum(loss is not None for loss in apart.values())
        assert n_done == TRIALS // 2, n_done
        print(f"| {width} | {before:.2f} | {after:.2f} | {mid:.2f} ({low:.2f} to {high:.2f}) |")


if __name__ == "__main__":
    main()
