"""Measures what branched training saves: token horizons on one trunk, against separate trials.

The trials are the quickstart's, with a WSD schedule and its warmup in tokens. Both ways train the
stacks of learning rates that a worker would get, in alternating rounds, in one process on one
thread. Prints CPU seconds; the FLOPs are those of `scaletune count`. Table: benchmarks/README.md.

    OMP_NUM_THREADS=1 python benchmarks/branching.py
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from scaletune import counting, recipe, sweeping, training
from scaletune.counting import branches
from scaletune.recipe import Recipe
from scaletune.sweeping import stacks

STUDY = Path(__file__).parents[1] / "configs" / "quickstart.toml"
WARMUP = 4096  # tokens: a tenth of the shortest horizon
HEADER = (
    "| width | trials | separate, s | branched, s | ratio (range) | FLOPs ratio | same losses |\n"
    + "|---" * 7
    + "|"
)


def points(width: int, branch: bool) -> list[Recipe]:
    overrides = {
        "axes.width": f"[{width}]",
        "axes.seed": "[0]",
        "schedule.warmup_tokens": WARMUP,
        "engine.branch": str(branch).lower(),
    }
    return recipe.points(
        recipe.load(STUDY, [f"{name}={value}" for name, value in overrides.items()])
    )


def train(recipes: list[Recipe], acc: Accelerator) -> tuple[float, dict[str, float | None]]:
    """(CPU seconds, loss by trial id) of one worker that trains these recipes."""
    queue = sorted(sweeping.tasks("main", recipes), key=lambda task: -task.cost)
    losses, start = {}, time.process_time()
    while queue:
        stack = [task.recipe for task in stacks.take_stack(queue, 1)]
        for trial, _ in training.train_stack(stack, ["main"] * len(stack), acc):
            losses[trial.id] = trial.loss
    return time.process_time() - start, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    acc = training.accelerator()
    gc.freeze()  # as a worker does
    print(f"torch {torch.__version__}, one thread, CPU time, {args.rounds} alternated rounds,")
    print(f"load {os.getloadavg()[0]:.1f}\n\n{HEADER}")
    for width in args.widths:
        recipes = {branch: points(width, branch) for branch in (False, True)}
        rounds = [
            {branch: train(each, acc) for branch, each in recipes.items()}
            for _ in range(args.rounds)
        ]
        seconds = {branch: [each[branch][0] for each in rounds] for branch in recipes}
        ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
        rows = [counting.count_point(point) for point in recipes[True]]
        cost = branches.branched_cost(recipes[True], rows)["flops"]
        flops = cost / sum(row["flops"] for row in rows)
        same = sum(
            each[True][1][i] == loss for each in rounds for i, loss in each[False][1].items()
        )
        separate, branched = (statistics.median(seconds[branch]) for branch in (False, True))
        print(
            f"| {width} | {len(rows)} | {separate:.1f} | {branched:.1f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
            f"| {flops:.3f} | {same} of {len(rows) * len(rounds)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
