"""Any module as a stack of trials by `torch.func`: for models that are not the zoo's, whose parameters carry no trial axis."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from scaletune.errors import UserError

REFUSALS = ("vmap", "batch", "doesn't have storage")  # the last is `.numpy()`'s


class VmapStack(nn.Module):
    """Modules of one kind as one: `stack(*inputs)` is what each gives for the same inputs, [K, ...].

    Parameters are the modules' own with a leading axis, which `optim` and a plan take as they are; a name's dots are "/" in them. Call
    `.sum().backward()` on losses [K] outside: `vmap` of a gradient falls back to loops in attention's backward pass. Draws of dropout are
    each trial's own, and no longer those of a module alone. UserError where vmap refuses: batch norm's running statistics, control
    flow that depends on values, `.item()`.
    """

    template: nn.Module

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        kinds = {type(module).__name__ for module in modules}
        if len(kinds) != 1:
            raise UserError(
                f"the modules of a stack must be of one kind, but got {', '.join(sorted(kinds)) or 'none'}"
            )
        for module in modules[1:]:
            _same_shapes(modules[0], module)
        parameters, buffers = _stacked(modules)
        self.__dict__["template"] = copy.deepcopy(modules[0]).to(
            "meta"
        )  # hidden from the module tree: it holds no weights, and ties none
        self.ties = _ties(modules[0])
        self.stacked = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(value.detach(), value.requires_grad)
                for name, value in parameters.items()
            }
        )
        for name, value in buffers.items():
            self.register_buffer(f"buffer/{name.replace('.', '/')}", value)

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers under the names they have in one module, a tied one under each of its own, [K, ...] each."""
        own = dict(self.stacked.items()) | {
            name.removeprefix("buffer/"): value for name, value in self.named_buffers()
        }
        state = {name.replace("/", "."): value for name, value in own.items()}
        return state | {name: state[first] for name, first in self.ties.items()}

    def trial(self, k: int) -> dict[str, Tensor]:
        """One trial's state dict."""
        state = self.state()
        return {name: state[name][k].detach().clone() for name in self.template.state_dict()}

    def forward(self, *inputs: Any) -> Tensor:
        def one(state: dict[str, Tensor]) -> Any:
            return functional_call(self.template, state, inputs)

        self.template.train(self.training)
        try:
            return vmap(one, randomness="different")(self.state())
        except (RuntimeError, ValueError, torch._dynamo.exc.Unsupported) as error:
            if not any(sign in str(error).lower() for sign in REFUSALS):
                raise
            raise _refused(self.template, error) from error


def _refused(module: nn.Module, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"a {type(module).__name__} cannot stack, as vmap refuses it ({reason}): train its trials apart"
    )


def _stacked(modules: Sequence[nn.Module]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return stack_module_state(list(modules))
    except (
        RuntimeError,
        ValueError,
    ) as error:  # of parametrized modules each has a class of its own; some are frozen, others not
        raise _refused(modules[0], error) from error


def _ties(module: nn.Module) -> dict[str, str]:
    """The further names of a tensor that has several -> its first."""
    firsts, ties = dict[Tensor, str](), {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if firsts.setdefault(tensor, name) != name:
            ties[name] = firsts[tensor]
    return ties


def _same_shapes(one: nn.Module, other: nn.Module) -> None:
    here, there = (
        {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for module in (one, other)
    )
    odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if odd:
        raise UserError(
            f"the modules of a stack must have the same shapes, but `{odd[0]}` is {here.get(odd[0])} and {there.get(odd[0])}"
        )
