"""One step's gradient: the process's rows of the global batch, in micro-batches, averaged over all processes."""

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
from scaletune.training.gradient_noise import Noise

Part = tuple[Tensor, Tensor]  # inputs, targets


def parts(batch: Batch, acc: Accelerator, accumulation: int) -> list[Part]:
    """This process's rows, every `num_processes`-th of the global batch, in equal micro-batches on the device."""
    own = (
        torch.from_numpy(part[acc.process_index :: acc.num_processes]).to(acc.device)
        for part in batch
    )
    return list(zip(*(part.chunk(accumulation) for part in own), strict=True))


class ZLoss:
    """Adds coefficient * mean of log(Z)**2 to a language model's loss, Z the softmax's denominator (arXiv:2204.02311, section 5).

    It reads the logits where they leave the readout, so that whatever else a model's own loss is made of stays as it is.
    """

    def __init__(self, net: nn.Module, coefficient: float):
        if not hasattr(net, "lm_head"):
            raise UserError(
                f"`training.z_loss` is for language models, but got a {type(net).__name__}"
            )
        self.coefficient, self.multiplier = coefficient, cast(float, net.logits)
        self.logits: Tensor | None = None
        net.get_submodule("lm_head").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self) -> Tensor:
        """Of the last forward pass."""
        assert self.logits is not None
        log_z = (self.logits.float() * self.multiplier).logsumexp(-1)
        self.logits = None  # it holds the pass's graph
        return self.coefficient * log_z.square().mean()


@dataclass
class Descent:
    """How a trial turns rows into gradients."""

    model: Callable[..., Tensor]  # as it trains: over processes, compiled
    net: nn.Module  # the plain one
    settings: Training
    acc: Accelerator
    z_loss: ZLoss | None = None

    def __post_init__(self) -> None:
        if self.settings.z_loss:
            self.z_loss = ZLoss(self.net, self.settings.z_loss)

    def backward(self, step: Sequence[Part]) -> Tensor:
        """Put the gradient of the global batch into `.grad`; ranks speak to each other in the last micro-batch alone.

        This process's mean loss, on the device.
        """
        losses = []
        for i, part in enumerate(step, 1):
            with nullcontext() if i == len(step) else self.acc.no_sync(self.model):
                losses.append(self._descend(part, len(step)))
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def measured(self, step: Sequence[Part], noise: Noise) -> Tensor:
        """`backward`, with what the micro-batches' gradients and their mean say of the noise put into `noise`."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        losses, squares = [], []
        totals: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        for part in step:
            with self.acc.no_sync(self.model):
                losses.append(self._descend(part, len(step)))
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            squares.append(
                _squared(grads) * len(step) ** 2
            )  # each was descended at 1 / count of its weight
            torch._foreach_add_(totals, grads)
            self.net.zero_grad()
        small = torch.stack(squares).mean()
        if self.acc.num_processes > 1:
            totals, small = (
                [self.acc.reduce(total, "mean") for total in totals],
                self.acc.reduce(small, "mean"),
            )
        for p, total in zip(parameters, totals, strict=True):
            p.grad = total
        rows = len(step[0][0])
        noise.add(
            float(small), float(_squared(totals)), rows, rows * len(step) * self.acc.num_processes
        )
        return torch.stack(losses).mean()

    def _descend(self, part: Part, count: int) -> Tensor:
        """Add 1 / count of a micro-batch's gradient to `.grad`; its loss, without the z-loss."""
        with precision(self.settings, self.acc):
            loss = self.model(*part).sum()
        whole = loss + self.z_loss() if self.z_loss else loss
        (
            whole if count == 1 else whole / count
        ).backward()  # `Accelerator.backward` would divide by its own count, and scale for fp16
        return loss.detach()


def precision(settings: Training, acc: Accelerator) -> AbstractContextManager:
    """What a forward pass runs in."""
    return (
        torch.autocast(acc.device.type, torch.bfloat16)
        if settings.precision == "bf16"
        else nullcontext()
    )


def _squared(tensors: list[Tensor]) -> Tensor:
    """The squared norm of all of them as one vector."""
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
