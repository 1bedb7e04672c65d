"""Activations of any model, by the role of the tensors its modules own: forward hooks, which are gone when the look is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaletune.checking.target import Run, Subject, steady
from scaletune.errors import UserError
from scaletune.parametrizing import shapes
from scaletune.rules import Role


@dataclass
class Call:
    """One call of a module that owns tensors: what it read, before any multiplier, and what it said."""

    name: str
    role: Role
    x: Any
    y: Any = None


@dataclass(frozen=True)
class Seen:
    """One forward pass: the calls in the order they began, and the logits."""

    calls: list[Call]
    logits: Tensor


def owners(run: Run) -> dict[str, Role]:
    """Module -> the role of the matrix it owns, or of its vectors where it owns none; a tied head reads out."""
    found: dict[str, Role] = {}
    for raw, parameter in shapes.unwrapped(run.model).named_parameters(remove_duplicate=False):
        name = shapes.plain(raw)
        where = name.rpartition(".")[0]
        role = run.roles.get(name, "out" if parameter.ndim > 1 else "vec")
        if where not in found or found[where] in ("vec", "fin"):
            found[where] = role
    return found


@contextmanager
def watched(run: Run) -> Iterator[list[Call]]:
    """Collects the calls made inside."""
    calls: list[Call] = []
    modules = shapes.modules(run.model)
    with ExitStack() as stack:
        for name, role in owners(run).items():
            watch = _Watch(name, role, calls)
            stack.callback(
                modules[name]
                .register_forward_pre_hook(watch.before, prepend=True, with_kwargs=True)
                .remove
            )
            stack.callback(modules[name].register_forward_hook(watch.after).remove)
        yield calls


@dataclass(frozen=True)
class _Watch:
    name: str
    role: Role
    calls: list[Call]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.calls.append(
            Call(self.name, self.role, args[0] if args else next(iter(kwargs.values()), None))
        )

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = next(call for call in reversed(self.calls) if call.name == self.name)
        call.y = output[0] if isinstance(output, tuple) else output


def look(subject: Subject, run: Run, batch: Any) -> Seen:
    """A forward pass, watched; with gradients where the caller wants them."""
    with steady(run.model, 0), watched(run) as calls:
        said = (subject.logits or subject.loss)(run.model, batch)
    head = _head(calls)
    return Seen(calls, said if subject.logits else head.y)


def _head(calls: list[Call]) -> Call:
    """The last readout to be called: a router is one too, and comes before."""
    heads = [call for call in calls if call.role == "out"]
    if not heads:
        raise UserError(
            "a check needs a readout, a tensor whose fan-in alone grows with width, but no module of the model owns one"
        )
    return heads[-1]


def activations(seen: Seen, over: str = "width") -> dict[str, Tensor]:
    """What diagnosing needs, by role: what the first layer after the embedding reads, what follows the last hidden tensor, what the
    readout reads, the logits. In a Transformer: embedding, residual stream after the last block, the same normed, logits.

    Over depth a norm inside the last branch is passed by: the stream is to be the same at every depth, and one branch of many need not be.
    """
    calls, found = seen.calls, {}
    first = next((i for i, call in enumerate(calls) if call.role == "emb"), None)
    if first is not None:
        found["embedding"] = next(call for call in calls[first:] if call.role != "emb").x
    hidden = [i for i, call in enumerate(calls) if call.role == "hid"]
    if hidden:
        last, after = calls[hidden[-1]], calls[hidden[-1] + 1 :]
        after = [call for call in after if over == "width" or call.x is not last.y]
        found["residual"] = after[0].x if after else last.y
    return found | {"final": _head(calls).x, "logits": seen.logits}


@torch.no_grad()
def zero_head(subject: Subject, run: Run, batch: Any) -> None:
    """A readout of zeros; UserError for a tied one, whose zeros would be the embedding's."""
    name = f"{_head(look(subject, run, batch).calls).name}.weight"
    if run.roles.get(name) != "out":
        raise UserError(
            f"the coordinate check starts from a readout of zeros, which the tied `{name}` cannot be: check the model untied"
        )
    shapes.named(run.model)[name].zero_()


def hold(run: Run, role: Role) -> None:
    """Tensors of that role are no longer trained."""
    for name, parameter in shapes.named(run.model).items():
        parameter.requires_grad_(parameter.requires_grad and run.roles[name] != role)


@torch.no_grad()
def normalise(subject: Subject, run: Run, batch: Any) -> None:
    """An embedding of RMS 1: below it the branches make up the stream, and a sound depth rule seems to fail."""
    rms = float(activations(look(subject, run, batch))["embedding"].square().mean().sqrt())
    for name, parameter in shapes.named(run.model).items():
        if run.roles[name] == "emb":
            parameter.div_(rms)
