"""Which user's modules can train as a stack through `torch.func.vmap`, and the stack of some.

A recipe asks for it with a number as `engine.stack`; "auto" trains a user's module alone, because
stacked results are equal only up to rounding. A module cannot be stacked if vmap does not support
its code, if it draws random numbers while it trains (dropout: the draws of a stack differ from
those of a trial alone), or if it changes buffers (the running statistics of BatchNorm).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scaletune import data
from scaletune.errors import UserError
from scaletune.models import own
from scaletune.models.own import OwnModel
from scaletune.recipe import Recipe
from scaletune.training.vmap_stack import VmapStack

ROWS = 2  # of the batch that is tried
TOLERANCE = 1e-4  # relative difference of losses that is rounding


def no_own_stack_reason(recipe: Recipe) -> str:
    """Why the module of a point cannot train in a stack; empty if it can.

    It trains nothing: it compares the losses and gradients of two rows.
    """
    corpus = data.load(recipe.data)
    module = own.build_module(recipe, corpus.vocab_size, text=not corpus.features)
    net = OwnModel(module, corpus.vocab_size)
    name, seq_len = type(module).__name__, recipe.data.seq_len
    batch = [torch.from_numpy(part[:ROWS]) for part in corpus.held_out_batch(2 * seq_len, seq_len)]
    alone = [_loss(copy.deepcopy(net), batch, seed) for seed in (0, 0, 1)]
    if not torch.equal(alone[0][0], alone[1][0]) or not torch.equal(alone[0][0], alone[2][0]):
        return f"{name} draws random numbers while it trains (dropout)"
    buffers = dict(net.named_buffers())
    if any(not torch.equal(value, buffers[key]) for key, value in alone[0][1].named_buffers()):
        return f"{name} changes its buffers while it trains (running statistics)"
    try:
        stacked, stack = _loss(VmapStack([copy.deepcopy(net), copy.deepcopy(net)]), batch, 0)
    except UserError as error:
        return str(error)
    pairs = zip(stack.parameters(), alone[0][1].parameters(), strict=True)
    losses = torch.allclose(stacked.flatten(), alone[0][0].expand(2), rtol=TOLERANCE)
    if not losses or not all(_same_gradient(row, one) for row, one in pairs):
        return f"{name} computes other losses under vmap than alone"
    return ""


def _loss(net: nn.Module, batch: Sequence[Tensor], seed: int) -> tuple[Tensor, nn.Module]:
    """The training loss of a batch, and the module with its gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.train()
        loss = net(*batch)
        loss.sum().backward()
    return loss.detach(), net


def _same_gradient(row: Tensor, one: Tensor) -> bool:
    if row.grad is None or one.grad is None:
        return row.grad is None and one.grad is None
    limit = 1e-3 * float(one.grad.abs().max()) + 1e-12
    return float((row.grad[1] - one.grad).abs().max()) <= limit
