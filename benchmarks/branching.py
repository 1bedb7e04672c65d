"""What a trunk that serves several horizons saves: the quickstart's three, under wsd with its warmup in tokens, branched and apart.

`OMP_NUM_THREADS=1 python benchmarks/branching.py` trains the orders that a worker would be handed (stacks of learning rates), both
ways, round by round, in one process on one thread, and prints CPU seconds; the FLOPs are `scaletune count`'s. Table in benchmarks/README.md.
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
WARMUP = 4096  # tokens: the shortest horizon's own tenth


def points(width: int, branch: bool) -> list[Recipe]:
    asked = {
        "axes.width": f"[{width}]",
        "axes.seed": "[0]",
        "schedule.warmup_tokens": WARMUP,
        "engine.branch": str(branch).lower(),
    }
    return recipe.points(recipe.load(STUDY, [f"{name}={value}" for name, value in asked.items()]))


def trained(asked: list[Recipe], acc: Accelerator) -> tuple[float, dict[str, float | None]]:
    """(CPU seconds, loss by trial) of what one worker does for these."""
    queue = sorted(sweeping.tasks("main", asked), key=lambda task: -task.cost)
    losses, began = {}, time.process_time()
    while queue:
        order = stacks.take(queue, 1)
        losses |= {
            trial.id: trial.loss
            for trial, _ in training.stacked([t.recipe for t in order], ["main"] * len(order), acc)
        }
    return time.process_time() - began, losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    acc = training.accelerator()
    gc.freeze()  # as a worker does
    print(
        f"torch {torch.__version__}, one thread, CPU time, {args.rounds} alternated rounds, load {os.getloadavg()[0]:.1f}"
    )
    print(
        "| width | trials | apart, s | branched, s | ratio (range) | FLOPs ratio | same losses |\n|---|---|---|---|---|---|---|"
    )
    for width in args.widths:
        ways = {branch: points(width, branch) for branch in (False, True)}
        rounds = [
            {branch: trained(asked, acc) for branch, asked in ways.items()}
            for _ in range(args.rounds)
        ]
        seconds = {branch: [each[branch][0] for each in rounds] for branch in ways}
        ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
        rows = [counting.count(point) for point in ways[True]]
        flops = branches.saving(ways[True], rows)["flops"] / sum(row["flops"] for row in rows)
        same = sum(
            each[True][1][i] == loss for each in rounds for i, loss in each[False][1].items()
        )
        print(
            f"| {width} | {len(rows)} | {statistics.median(seconds[False]):.1f} | {statistics.median(seconds[True]):.1f}"
            f" | {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {flops:.3f} | {same} of {len(rows) * len(rounds)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
