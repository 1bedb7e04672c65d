"""The held-out loss."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from scaletune import data
from scaletune.models.own import own_draws
from scaletune.recipe import Recipe
from scaletune.training.sharding import is_sharded

EVAL_ROWS = 64
"""Windows per forward pass. Limits memory; the loss does not depend on it."""


@torch.no_grad()
def evaluate(model: nn.Module, corpus: data.Corpus, recipe: Recipe, acc: Accelerator) -> float:
    """Mean held-out loss in nats per token, over the same windows for every trial, in float32.

    Processes share the forward passes. `model` must be the plain model: a DDP wrapper would wait
    for processes that have fewer passes. Of a sharded model each process makes as many passes.
    """
    batch = corpus.held_out_batch(recipe.budget.eval_tokens, recipe.data.seq_len)
    passes = list(zip(*(torch.from_numpy(part).split(EVAL_ROWS) for part in batch), strict=True))
    model.eval()
    total = 0.0
    with own_draws(model, acc.device, recipe.seed, "evaluation"):  # of a module that draws here too
        for i in range(acc.process_index, len(passes), acc.num_processes):
            inputs, targets = (part.to(acc.device) for part in passes[i])
            total += float(model(inputs, targets)) * len(inputs)
    if is_sharded(model) and 0 < len(passes) % acc.num_processes <= acc.process_index:
        model(*(part.to(acc.device) for part in passes[0]))  # others wait for our shards
    model.train()
    if acc.num_processes > 1:
        total = float(
            acc.reduce(torch.tensor(total, dtype=torch.float64, device=acc.device), "sum")
        )
    return total / len(batch[0])
