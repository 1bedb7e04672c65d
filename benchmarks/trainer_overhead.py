"""Compares our training loop with a hand-written PyTorch loop.

Model, data and optimizer are the same. The two take turns step by step in one process on one
thread: after each step of ours, one of the hand-written loop. Measures CPU time of the process,
which other work on the machine hardly affects. Table: benchmarks/README.md.

    python benchmarks/trainer_overhead.py
"""

from __future__ import annotations

import statistics
import time

import torch
from accelerate import Accelerator

from scaletune import counting, data, models, optim, training
from scaletune.recipe import Recipe, validate_recipe

STEPS, WARM, ROUND = 440, 40, 20
SIZES = {32: 256, 64: 512, 96: 512}  # width: tokens per batch
HEADER = (
    "| width | batch tokens | ours, ms per step | hand-written | ratio (quartiles over rounds) |\n"
    + "|---" * 5
    + "|"
)


def build_recipe(width: int, batch_tokens: int, **engine: object) -> Recipe:
    values = {
        "model": {"width": width, "depth": 2},
        "parametrization": {"base_width": 64},
        "engine": engine,
        "budget": {
            "tokens": STEPS * batch_tokens,
            "batch_tokens": batch_tokens,
            "eval_tokens": 64,
        },
    }
    return validate_recipe(values, "overhead")


class HandWritten:
    """A plain loop: batch, forward, backward, clip, schedule, step; reads the loss in each step."""

    def __init__(self, recipe: Recipe, corpus: data.Corpus):
        self.recipe, self.corpus, self.step = recipe, corpus, 0
        self.model = models.build(recipe, corpus.vocab_size)
        tensors = counting.plan_tensors(recipe, corpus.vocab_size)
        self.opt = optim.optimizer(self.model, tensors, recipe.optimizer)
        self.curve: list[float] = []

    def __call__(self) -> None:
        recipe, steps = self.recipe, self.recipe.budget.steps
        rows, seq_len = recipe.budget.batch_tokens // recipe.data.seq_len, recipe.data.seq_len
        batch = self.corpus.batch(recipe.seed, self.step, rows, seq_len)
        inputs, targets = map(torch.from_numpy, batch)
        multiplier = optim.multiplier(recipe.schedule, (self.step + 0.5) / steps)
        for group in self.opt.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        loss = self.model(inputs, targets).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip)
        self.opt.step()
        self.opt.zero_grad()
        self.curve.append(loss.item())
        self.step += 1


def time_rounds(recipe: Recipe, acc: Accelerator) -> list[tuple[float, float]]:
    """(ours, hand-written) milliseconds per step: medians of rounds of ROUND alternated steps.

    Both loops must give the same losses to the last bit.
    """
    corpus = data.load(recipe.data)
    theirs = HandWritten(recipe, corpus)
    times: list[tuple[float, float]] = []
    start = time.process_time()

    def after_ours(share: float) -> None:
        nonlocal start
        ours = time.process_time() - start
        start = time.process_time()
        theirs()
        times.append((ours * 1e3, (time.process_time() - start) * 1e3))
        start = time.process_time()

    outcome = training.train(recipe, corpus, acc, after_ours)
    acc.free_memory()
    assert outcome.curve == theirs.curve, "the two loops must give the same losses to the last bit"
    kept = times[WARM:]
    chunks = [kept[i : i + ROUND] for i in range(0, len(kept), ROUND)]
    return [
        (statistics.median(o for o, _ in chunk), statistics.median(t for _, t in chunk))
        for chunk in chunks
    ]


def main() -> None:
    torch.set_num_threads(1)
    acc = training.accelerator()
    print(f"depth 2, torch {torch.__version__}, one thread, {STEPS - WARM} steps each, alternated;")
    print(f"medians of rounds of {ROUND}\n\n{HEADER}")
    for width, batch_tokens in SIZES.items():
        rounds = time_rounds(build_recipe(width, batch_tokens), acc)
        low, middle, high = statistics.quantiles([ours / theirs for ours, theirs in rounds], n=4)
        ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"| {width} | {batch_tokens} | {ours:.2f} | {theirs:.2f} "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
