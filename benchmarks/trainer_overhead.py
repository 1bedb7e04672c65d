"""What our loop costs beside a hand-written PyTorch loop of the same model, data and optimizer.

`python benchmarks/trainer_overhead.py` alternates the two step by step: after each step of ours, one of theirs, in one process on
one thread. CPU time of the process, which other work on the machine does not touch. Table in benchmarks/README.md.
"""

from __future__ import annotations

import statistics
import time

import torch
from accelerate import Accelerator

from scaletune import counting, data, models, optim, training
from scaletune.recipe import Recipe, validated

STEPS, WARM, ROUND = 440, 40, 20
SIZES = {32: 256, 64: 512, 96: 512}  # width: tokens a batch


def recipe(width: int, batch_tokens: int, **engine: object) -> Recipe:
    return validated(
        {
            "model": {"width": width, "depth": 2}, "parametrization": {"base_width": 64}, "engine": engine,
            "budget": {"tokens": STEPS * batch_tokens, "batch_tokens": batch_tokens, "eval_tokens": 64},
        },
        "overhead",
    )  # fmt: skip


class HandWritten:
    """The loop one would write: the batch, forward, backward, clip, schedule, step, and the loss read each step."""

    def __init__(self, asked: Recipe, corpus: data.Corpus):
        self.asked, self.corpus, self.step = asked, corpus, 0
        self.model = models.build(asked, corpus.vocab_size)
        self.opt = optim.optimizer(
            self.model, counting.planned(asked, corpus.vocab_size), asked.optimizer
        )
        self.curve: list[float] = []

    def __call__(self) -> None:
        asked, steps = self.asked, self.asked.budget.steps
        rows, seq_len = asked.budget.batch_tokens // asked.data.seq_len, asked.data.seq_len
        inputs, targets = map(
            torch.from_numpy, self.corpus.batch(asked.seed, self.step, rows, seq_len)
        )
        now = optim.multiplier(asked.schedule, (self.step + 0.5) / steps)
        for group in self.opt.param_groups:
            group["lr"] = group["initial_lr"] * now
        loss = self.model(inputs, targets).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), asked.optimizer.clip)
        self.opt.step()
        self.opt.zero_grad()
        self.curve.append(loss.item())
        self.step += 1


def rounds(asked: Recipe, acc: Accelerator) -> list[tuple[float, float]]:
    """(ours, theirs) milliseconds a step, in rounds of ROUND alternated steps; the two must train the same losses."""
    corpus = data.load(asked.data)
    theirs = HandWritten(asked, corpus)
    spent: list[tuple[float, float]] = []
    began = time.process_time()

    def after_ours(share: float) -> None:
        nonlocal began
        ours = time.process_time() - began
        began = time.process_time()
        theirs()
        spent.append((ours * 1e3, (time.process_time() - began) * 1e3))
        began = time.process_time()

    outcome = training.train(asked, corpus, acc, after_ours)
    acc.free_memory()
    assert outcome.curve == theirs.curve, "the loops must train the same bits"
    kept = spent[WARM:]
    chunks = [kept[i : i + ROUND] for i in range(0, len(kept), ROUND)]
    return [
        (statistics.median(o for o, _ in chunk), statistics.median(t for _, t in chunk))
        for chunk in chunks
    ]


def main() -> None:
    torch.set_num_threads(1)
    acc = training.accelerator()
    print(
        f"depth 2, torch {torch.__version__}, one thread, {STEPS - WARM} steps each, alternated; medians of rounds of {ROUND}"
    )
    print(
        "| width | batch tokens | ours, ms a step | hand-written | ratio (quartiles over rounds) |"
    )
    print("|---|---|---|---|---|")
    for width, batch_tokens in SIZES.items():
        found = rounds(recipe(width, batch_tokens), acc)
        low, middle, high = statistics.quantiles([ours / theirs for ours, theirs in found], n=4)
        ours, theirs = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"| {width} | {batch_tokens} | {ours:.2f} | {theirs:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
