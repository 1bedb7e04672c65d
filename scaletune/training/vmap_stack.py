"""Stacks any module by `torch.func.vmap`, for models whose parameters have no trial axis."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from scaletune.errors import UserError

VMAP_ERRORS = ("vmap", "batch", "doesn't have storage")
"""Parts of the errors that vmap raises; the last is the error of `.numpy()`."""


class VmapStack(nn.Module):
    """Modules of one class as one module: `stack(*inputs)` is [K, ...], the output of each.

    The parameters are those of the modules with a leading trial axis, as `optim` and a plan expect;
    dots in their names become "/". Sum the losses [K] and call `.backward()` outside: `vmap` of a
    gradient falls back to loops in attention's backward pass. Each trial has its own dropout
    draws, which differ from those of the module alone. UserError if vmap does not support the
    module: running statistics of batch norm, control flow that depends on values, `.item()`.
    """

    template: nn.Module

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        kinds = {type(module).__name__ for module in modules}
        if len(kinds) != 1:
            raise UserError(
                "the modules of a stack must be of one class,"
                f" but got {', '.join(sorted(kinds)) or 'no module'}"
            )
        for module in modules[1:]:
            _check_same_shapes(modules[0], module)
        parameters, buffers = _stack_state(modules)
        # Not registered as a submodule: it holds no weights.
        self.__dict__["template"] = copy.deepcopy(modules[0]).to("meta")
        self.ties = _ties(modules[0])
        self.stacked = nn.ParameterDict(
            [  # a list keeps the order of the modules' parameters; a dict would be sorted
                (name.replace(".", "/"), nn.Parameter(value.detach(), value.requires_grad))
                for name, value in parameters.items()
            ]
        )
        for name, value in buffers.items():
            self.register_buffer(f"buffer/{name.replace('.', '/')}", value)

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers, [K, ...], by their names in one module (all names if tied)."""
        tensors = dict(self.stacked.items()) | {
            name.removeprefix("buffer/"): value for name, value in self.named_buffers()
        }
        state = {name.replace("/", "."): value for name, value in tensors.items()}
        return state | {name: state[first] for name, first in self.ties.items()}

    def trial(self, k: int) -> dict[str, Tensor]:
        """The state dict of one trial."""
        state = self.state()
        return {name: state[name][k].detach().clone() for name in self.template.state_dict()}

    def forward(self, *inputs: Any) -> Tensor:
        def call_one(state: dict[str, Tensor]) -> Any:
            return functional_call(self.template, state, inputs)

        self.template.train(self.training)
        try:
            with warnings.catch_warnings():  # attention on a CPU is a loop over the trials
                warnings.filterwarnings("ignore", "There is a performance drop")
                return vmap(call_one, randomness="different")(self.state())
        except (RuntimeError, ValueError, torch._dynamo.exc.Unsupported) as error:
            if not any(part in str(error).lower() for part in VMAP_ERRORS):
                raise
            raise _vmap_error(self.template, error) from error


def _vmap_error(module: nn.Module, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"a {type(module).__name__} cannot be stacked, because vmap does not support it"
        f" ({reason}): train its trials alone"
    )


def _stack_state(modules: Sequence[nn.Module]) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return stack_module_state(list(modules))
    # Parametrized modules each have their own class; or some parameters are frozen in one only.
    except (RuntimeError, ValueError) as error:
        raise _vmap_error(modules[0], error) from error


def _ties(module: nn.Module) -> dict[str, str]:
    """Further names of tied tensors -> the first name."""
    first_names, ties = dict[Tensor, str](), {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if first_names.setdefault(tensor, name) != name:
            ties[name] = first_names[tensor]
    return ties


def _check_same_shapes(one: nn.Module, other: nn.Module) -> None:
    first, second = (
        {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for module in (one, other)
    )
    names = first.keys() | second.keys()
    differing = sorted(name for name in names if first.get(name) != second.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            "the modules of a stack must have the same shapes,"
            f" but `{name}` is {first.get(name)} and {second.get(name)}"
        )
