"""`OwnModel`: the user's module with the loss of scaletune's loop.

The loss is the mean cross-entropy of the module's logits in nats per target, as in the zoo, or the
mean squared error of a regression. A loss that the module returns is not read.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scaletune.errors import UserError
from scaletune.models.layers import mean_cross_entropy
from scaletune.models.own.source import describe

TARGETS = "targets"
"""A parameter of the user's `forward` with this name gets the targets. nanoGPT's computes the
logits of all positions only then."""
INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "inputs", "tokens", "features", "x", "idx")
"""Names of the inputs in a `forward` that takes keywords only."""


class OwnModel(nn.Module):
    """inputs -> logits [1, ...]; with targets -> the mean loss, [1].

    The module may return the logits, a tuple with them, a mapping with the key "logits", or an
    object with the attribute `logits`. They are [B, T, V] for tokens, [B, classes] for examples,
    [B] or [B, 1] for a regression; V may be padded.
    """

    def __init__(self, module: nn.Module, vocab_size: int):
        super().__init__()
        self.module, self.vocab_size = module, vocab_size
        parameters = inspect.signature(module.forward).parameters
        self.takes_targets = TARGETS in parameters
        positional = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL")
        takes_position = any(p.kind.name in positional for p in parameters.values())
        self.keyword = None if takes_position else _input_name(module, parameters)

    def logits(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """The logits of a batch, as the module gives them. Its inputs are contiguous."""
        inputs = inputs.contiguous()
        more = {}
        if self.takes_targets and targets is not None:
            more = {TARGETS: targets.contiguous()}
        if self.keyword is None:
            return self._select(self.module(inputs, **more), targets)
        return self._select(self.module(**{self.keyword: inputs}, **more), targets)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        y = self.logits(inputs, targets)
        if targets is None:
            return y[None]
        if self.vocab_size == 1:
            return (y - targets.reshape(y.shape)).square().mean()[None]
        return mean_cross_entropy(y.reshape(1, targets.numel(), -1), targets)

    def _select(self, output: Any, targets: Tensor | None) -> Tensor:
        """The logits in what the module returns."""
        if isinstance(output, Tensor):
            candidates: list[Any] = [output]
        elif getattr(output, "logits", None) is not None:
            candidates = [output.logits]
        elif isinstance(output, Mapping):
            candidates = [output["logits"]] if "logits" in output else list(output.values())
        elif isinstance(output, Iterable):
            candidates = list(output)
        else:
            candidates = []
        tensors = [each for each in candidates if isinstance(each, Tensor)]
        for each in tensors:
            if self._are_logits(each, targets):
                return each
        shapes = ", ".join(str(tuple(each.shape)) for each in tensors) or type(output).__name__
        raise UserError(
            f"the forward of {type(self.module).__name__} must return logits of shape"
            f" {self._expected(targets)}, but returned {shapes}"
        )

    def _are_logits(self, each: Tensor, targets: Tensor | None) -> bool:
        if targets is None:
            return each.ndim > 0
        if self.vocab_size == 1:
            return each.numel() == targets.numel() and each.ndim in (1, targets.ndim)
        rows = each.shape[:-1].numel() == targets.numel() if each.ndim > 1 else False
        same = each.shape[:-1] == targets.shape or each.ndim == 2
        return rows and same and each.shape[-1] >= self.vocab_size

    def _expected(self, targets: Tensor | None) -> str:
        if self.vocab_size == 1:
            return "[batch] or [batch, 1]"
        where = "batch, positions" if targets is not None and targets.ndim > 1 else "batch"
        return f"[{where}, {self.vocab_size}]"


def _input_name(module: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> str:
    for name in INPUTS:
        if name in parameters:
            return name
    raise UserError(
        f"the forward of {type(module).__name__} must take its inputs by position, or as one of"
        f" {', '.join(INPUTS)}, but it has {', '.join(parameters) or 'no parameters'}"
    )


@torch.no_grad()
def check_output(model: OwnModel, inputs: Tensor, targets: Tensor) -> None:
    """UserError unless the module computes finite-shaped logits from these rows.

    It runs in evaluation mode, so that it changes no running statistics.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            model(inputs, targets)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"the forward of {type(model.module).__name__} must compute logits from inputs of shape"
            f" {tuple(inputs.shape)} ({inputs.dtype}), but it raised {describe(error)}"
        ) from error
    finally:
        model.train(was_training)


def own_draws(net: nn.Module, device: torch.device, *key: object) -> AbstractContextManager[object]:
    """The context in which an own module draws random numbers (dropout), seeded by the key.

    A step's draws are a function of (seed, step, process), so a run that continues from a
    checkpoint draws the same. Models of the zoo draw nothing.
    """
    return _seeded(device, *key) if isinstance(net, OwnModel) else nullcontext()


@contextmanager
def _seeded(device: torch.device, *key: object) -> Iterator[None]:
    value = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(value)
        yield
