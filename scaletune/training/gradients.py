"""The gradient of one step: micro-batches of this process's rows, averaged over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scaletune.data import Batch
from scaletune.errors import UserError
from scaletune.recipe import Training
from scaletune.training.gradient_noise import GradientNoise

MicroBatch = tuple[Tensor, Tensor]
"""Inputs and targets."""


def micro_batches(batch: Batch, acc: Accelerator, accumulation: int) -> list[MicroBatch]:
    """This process's rows (every `num_processes`-th of the batch) in `accumulation` equal parts.

    The parts are on the device.
    """
    own_rows = (
        torch.from_numpy(part[acc.process_index :: acc.num_processes]).to(acc.device)
        for part in batch
    )
    return list(zip(*(part.chunk(accumulation) for part in own_rows), strict=True))


class ZLoss:
    """The z-loss of a language model: coefficient * mean of log(Z)**2 (arXiv:2204.02311, sec. 5).

    Z is the denominator of the softmax. A hook on the readout keeps the logits, so the model's own
    loss does not change.
    """

    def __init__(self, net: nn.Module, coefficient: float):
        if not hasattr(net, "lm_head"):
            raise UserError(
                f"`training.z_loss` needs a language model, but got a {type(net).__name__}"
            )
        self.coefficient, self.multiplier = coefficient, cast(float, net.logits)
        self.logits: Tensor | None = None
        net.get_submodule("lm_head").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self) -> Tensor:
        """The z-loss of the last forward pass."""
        assert self.logits is not None
        log_z = (self.logits.float() * self.multiplier).logsumexp(-1)
        self.logits = None  # releases the graph of the pass
        return self.coefficient * log_z.square().mean()


@dataclass
class GradientAccumulator:
    """Computes the gradient of a step from its micro-batches."""

    model: Callable[..., Tensor]
    """The model that trains: wrapped for several processes, or compiled."""

    net: nn.Module
    """The plain model."""

    settings: Training
    """Precision and z-loss."""

    acc: Accelerator
    """The Accelerator of this process."""

    z_loss: ZLoss | None = None
    """Created from the settings."""

    def __post_init__(self) -> None:
        if self.settings.z_loss:
            self.z_loss = ZLoss(self.net, self.settings.z_loss)

    def backward(self, batch: Sequence[MicroBatch]) -> Tensor:
        """Writes the gradient of the global batch to `.grad`; this process's mean loss, on device.

        Processes communicate only in the last micro-batch.
        """
        losses = []
        for i, micro_batch in enumerate(batch, 1):
            with nullcontext() if i == len(batch) else self.acc.no_sync(self.model):
                losses.append(self._backward_one(micro_batch, len(batch)))
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def backward_and_measure_noise(
        self, batch: Sequence[MicroBatch], noise: GradientNoise
    ) -> Tensor:
        """As `backward`; also adds a measurement from the micro-batches to `noise`."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        losses, squares = [], []
        totals: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        for micro_batch in batch:
            with self.acc.no_sync(self.model):
                losses.append(self._backward_one(micro_batch, len(batch)))
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            # Each gradient was divided by the number of micro-batches.
            squares.append(_squared_norm(grads) * len(batch) ** 2)
            torch._foreach_add_(totals, grads)
            self.net.zero_grad()
        small = torch.stack(squares).mean()
        if self.acc.num_processes > 1:
            totals = [self.acc.reduce(total, "mean") for total in totals]
            small = self.acc.reduce(small, "mean")
        for p, total in zip(parameters, totals, strict=True):
            p.grad = total
        rows = len(batch[0][0])
        all_rows = rows * len(batch) * self.acc.num_processes
        noise.add(float(small), float(_squared_norm(totals)), rows, all_rows)
        return torch.stack(losses).mean()

    def _backward_one(self, micro_batch: MicroBatch, count: int) -> Tensor:
        """Adds 1 / count of a micro-batch's gradient to `.grad`; its loss without the z-loss."""
        with precision(self.settings, self.acc):
            loss = self.model(*micro_batch).sum()
        total = loss + self.z_loss() if self.z_loss else loss
        # Not `Accelerator.backward`: it divides by its own count, and scales for fp16.
        (total if count == 1 else total / count).backward()
        return loss.detach()


def precision(settings: Training, acc: Accelerator) -> AbstractContextManager:
    """The precision of a forward pass, as a context."""
    return (
        torch.autocast(acc.device.type, torch.bfloat16)
        if settings.precision == "bf16"
        else nullcontext()
    )


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    """The squared norm of all tensors as one vector."""
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
