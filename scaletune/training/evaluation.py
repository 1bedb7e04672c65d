"""The held-out loss."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from scaletune import data
from scaletune.recipe import Recipe

EVAL_ROWS = 64  # windows a forward pass: bounds memory, not the result


@torch.no_grad()
def evaluate(model: nn.Module, corpus: data.Corpus, recipe: Recipe, acc: Accelerator) -> float:
    """Mean held-out loss, nats per token, over the same windows for every trial; in float32, each process its share of the passes.

    `model` is the plain one: a DDP wrapper would wait for ranks that have fewer passes.
    """
    batch = corpus.held_out_batch(recipe.budget.eval_tokens, recipe.data.seq_len)
    parts = list(zip(*(torch.from_numpy(part).split(EVAL_ROWS) for part in batch), strict=True))
    model.eval()
    own = (
        tuple(part.to(acc.device) for part in parts[i])
        for i in range(acc.process_index, len(parts), acc.num_processes)
    )
    total = sum(float(model(inputs, targets)) * len(inputs) for inputs, targets in own)
    model.train()
    if acc.num_processes > 1:
        total = float(
            acc.reduce(torch.tensor(total, dtype=torch.float64, device=acc.device), "sum")
        )
    return total / len(batch[0])
