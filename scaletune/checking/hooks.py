"""Records the activations of any model in one forward pass, by the role of its tensors.

The forward hooks are removed when the pass is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaletune.checking.target import CheckRun, CheckTarget, fixed_randomness
from scaletune.errors import UserError
from scaletune.parametrizing import shapes
from scaletune.rules import Role


@dataclass
class ModuleCall:
    """One call of a module that owns tensors."""

    name: str
    """Name of the module."""

    role: Role
    """Role of the matrix that the module owns, or of its vectors."""

    x: Any
    """First input, before any multiplier."""

    y: Any = None
    """First output."""


@dataclass(frozen=True)
class ForwardPass:
    """One recorded forward pass."""

    calls: list[ModuleCall]
    """Module calls in the order in which they began."""

    logits: Tensor
    """Output of the model."""


def module_roles(run: CheckRun) -> dict[str, Role]:
    """Role of the matrix that each module owns, or of its vectors. A tied readout is "out"."""
    roles: dict[str, Role] = {}
    for raw, parameter in shapes.unwrap(run.model).named_parameters(remove_duplicate=False):
        name = shapes.strip_wrappers(raw)
        where = name.rpartition(".")[0]
        role = run.roles.get(name, "out" if parameter.ndim > 1 else "vec")
        if where not in roles or roles[where] in ("vec", "fin"):
            roles[where] = role
    return roles


@contextmanager
def record_calls(run: CheckRun) -> Iterator[list[ModuleCall]]:
    """Records the module calls made inside the `with` block."""
    calls: list[ModuleCall] = []
    modules = shapes.named_modules(run.model)
    with ExitStack() as stack:
        for name, role in module_roles(run).items():
            recorder, module = _Recorder(name, role, calls), modules[name]
            before = module.register_forward_pre_hook(
                recorder.before, prepend=True, with_kwargs=True
            )
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(recorder.after).remove)
        yield calls


@dataclass(frozen=True)
class _Recorder:
    """Hooks of one module that append to `calls`."""

    name: str
    role: Role
    calls: list[ModuleCall]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        self.calls.append(ModuleCall(self.name, self.role, first))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = next(call for call in reversed(self.calls) if call.name == self.name)
        call.y = output[0] if isinstance(output, tuple) else output


def run_forward(target: CheckTarget, run: CheckRun, batch: Any) -> ForwardPass:
    """One recorded forward pass. The caller decides about gradients."""
    with fixed_randomness(run.model, 0), record_calls(run) as calls:
        output = (target.logits or target.loss)(run.model, batch)
    readout = _readout(calls)
    return ForwardPass(calls, output if target.logits else readout.y)


def _readout(calls: list[ModuleCall]) -> ModuleCall:
    """The last call of a readout. A router has the role of a readout too, but is called earlier."""
    readouts = [call for call in calls if call.role == "out"]
    if not readouts:
        raise UserError(
            "a check needs a readout, a tensor whose fan-in grows with width and whose fan-out does"
            " not, but no module that is called owns one: declare it with `overrides`"
        )
    return readouts[-1]


def activations(forward: ForwardPass, over: str = "width") -> dict[str, Tensor]:
    """The activations that a diagnosis needs.

    Args:
        forward: A recorded forward pass.
        over: What the check varies. Over depth, a norm inside the last residual branch is skipped:
            the residual stream should be equal at every depth, one of many branches need not be.

    Returns:
        "embedding": input of the first layer after the embedding. "residual": what follows the last
        hidden tensor; in a Transformer the residual stream after the last block. "final": input of
        the readout. "logits". The first two are missing in a model without such tensors.
    """
    calls: list[ModuleCall] = forward.calls
    result: dict[str, Tensor] = {}
    first = next((i for i, call in enumerate(calls) if call.role == "emb"), None)
    if first is not None:
        result["embedding"] = next(call for call in calls[first:] if call.role != "emb").x
    hidden = [i for i, call in enumerate(calls) if call.role == "hid"]
    if hidden:
        last, after = calls[hidden[-1]], calls[hidden[-1] + 1 :]
        after = [call for call in after if over == "width" or call.x is not last.y]
        result["residual"] = after[0].x if after else last.y
    return result | {"final": _readout(calls).x, "logits": forward.logits}


@torch.no_grad()
def zero_readout(target: CheckTarget, run: CheckRun, batch: Any) -> None:
    """Sets the readout to zero. UserError for a tied one, which is also the embedding."""
    name = f"{_readout(run_forward(target, run, batch).calls).name}.weight"
    if run.roles.get(name) != "out":
        raise UserError(
            "the coordinate check starts from a readout of zeros, but the readout"
            f" `{name}` is tied to the embedding: check the model with an untied readout"
        )
    shapes.named_tensors(run.model)[name].zero_()


def freeze(run: CheckRun, role: Role) -> None:
    """Stops the training of all tensors with this role."""
    for name, parameter in shapes.named_tensors(run.model).items():
        parameter.requires_grad_(parameter.requires_grad and run.roles[name] != role)


@torch.no_grad()
def normalise_embedding(target: CheckTarget, run: CheckRun, batch: Any) -> None:
    """Scales the embedding to RMS 1.

    With a smaller one the branches dominate the residual stream, and a correct depth rule seems to
    fail.
    """
    embedding = activations(run_forward(target, run, batch))["embedding"]
    rms = float(embedding.square().mean().sqrt())
    for name, parameter in shapes.named_tensors(run.model).items():
        if run.roles[name] == "emb":
            parameter.div_(rms)
