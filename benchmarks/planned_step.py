"""Measures the time of AdamW steps with the parameter groups of a plan.

Compares four sets of groups: those of a plan, as many plain groups, one plain group, and those of
`mup.MuAdamW`. They take turns, round by round, in one process on one thread. Prints the median of
the per-round ratios to plain fused AdamW with the same number of groups. Table:
benchmarks/README.md.

    python benchmarks/planned_step.py
"""

from __future__ import annotations

import copy
import statistics
import time

import mup
import torch
from torch import nn

import scaletune as st

WIDTH, BASE, DEPTH, ROUNDS, STEPS = 256, 64, 4, 41, 20


def mlp(width: int) -> nn.Sequential:
    """DEPTH hidden layers between an input layer and a readout, with biases."""
    hidden = [layer for _ in range(DEPTH) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *hidden, mup.MuReadout(width, 10))


def optimizers() -> dict[str, torch.optim.Optimizer]:
    """The four optimizers, each with its own model and random gradients."""
    prepared = mlp(WIDTH)
    mup.set_base_shapes(prepared, mlp(BASE), delta=mlp(BASE * 2))
    theirs = mup.MuAdamW(prepared.parameters(), lr=1e-3, fused=True)
    ours = copy.deepcopy(mlp(WIDTH))
    plan = st.parametrize(ours, base=mlp(BASE), lr=1e-3)
    planned = torch.optim.AdamW(plan.param_groups(ours), fused=True)
    plain = mlp(WIDTH)
    tensors = iter(plain.parameters())
    groups = [
        {"params": [next(tensors) for _ in group["params"]]} for group in planned.param_groups
    ]
    single = torch.optim.AdamW(mlp(WIDTH).parameters(), lr=1e-3, fused=True)
    results = {
        "plain, same groups": torch.optim.AdamW(groups, lr=1e-3, fused=True),
        "planned": planned,
        "plain, one group": single,
        "mup.MuAdamW": theirs,
    }
    for optimizer in results.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
    return results


def seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.thread_time()
    for _ in range(STEPS):
        optimizer.step()
    return time.thread_time() - start


def main() -> None:
    torch.set_num_threads(1)
    by_name = optimizers()
    rounds = [
        {name: seconds(optimizer) for name, optimizer in by_name.items()} for _ in range(ROUNDS)
    ]
    print(f"width {WIDTH} over base {BASE}, {DEPTH + 2} layers; torch {torch.__version__},")
    print(f"one thread, {ROUNDS} rounds of {STEPS} steps\n")
    print("| optimizer | groups | ms per step | ratio to plain, same groups (quartiles) |")
    print("|---|---|---|---|")
    for name, optimizer in by_name.items():
        ratios = [r[name] / r["plain, same groups"] for r in rounds[1:]]
        low, middle, high = statistics.quantiles(ratios, n=4)
        each = statistics.median(r[name] for r in rounds[1:]) / STEPS * 1e3
        print(
            f"| {name} | {len(optimizer.param_groups)} | {each:.3f} "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) |"
        )


if __name__ == "__main__":
    main()
