"""Fully sharded data parallelism (FSDP2): each process keeps a part of each tensor.

The part is of the weights, gradients and optimizer state. `fully_shard` gathers the weights of one
block at a time for its forward and backward pass. It is the function of torch that Accelerate
calls for `fsdp_version=2`. It is called here because Accelerate shards along axis 0, which is the
trial axis of the built-in models and has one entry, and does not shard on CPUs.

The names of the tensors stay, so the plan and its param groups apply to the sharded model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard
# torch.distributed.fsdp and .tensor take half a second to import, so only sharded trials do it.


def shard_model(net: nn.Module, acc: Accelerator) -> None:
    """Shards a model in place over all processes: each block of a list of blocks, then the rest."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh(acc.device.type, (acc.num_processes,))

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(shard_axis(parameter.shape, acc.num_processes))

    for module in [*reversed(_blocks(net)), net]:  # inner blocks first
        fully_shard(module, mesh=mesh, shard_placement_fn=place)


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The entries of the model's lists of modules that have parameters."""
    return [
        block
        for modules in net.modules()
        if isinstance(modules, nn.ModuleList)
        for block in modules
        if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters())
    ]


def shard_axis(shape: torch.Size, processes: int) -> int:
    """The axis along which a tensor is divided.

    Axis 0 if it has an entry for each process. Otherwise the first axis that divides equally, which
    FSDP2 requires of other axes; if there is none, axis 0: some processes then have no part.
    """
    if not shape or shape[0] >= processes:
        return 0
    return next((i for i, size in enumerate(shape) if size and size % processes == 0), 0)


def is_sharded(net: nn.Module) -> bool:
    """Whether the processes share the tensors of a model."""
    return hasattr(net, "set_requires_gradient_sync")  # of FSDPModule


def gather_tensors(value: Any, keep: bool) -> Any:
    """A copy of a state with whole tensors on the CPU where its tensors are sharded.

    All processes must call it. Those with `keep=False` take part and get no tensors, so that only
    one process holds the whole state.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gather_tensors(inner, keep) for key, inner in value.items()}
    return [gather_tensors(inner, keep) for inner in value] if isinstance(value, list) else value


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor that belongs to a parameter, if that is sharded.

    Tensors of another shape (such as step counts) stay whole.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    # Every process has read the whole tensor, so none must be sent.
    return distribute_tensor(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,
    )


def shard_model_state(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict of a model, divided as the model is."""
    own = net.state_dict()
    return {name: shard_like(value, own[name]) for name, value in state.items()}


def shard_optimizer_state(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole state dict of an optimizer, divided as its parameters are."""
    parameters = [p for group in opt.param_groups for p in group["params"]]
    return state | {
        "state": {
            i: {
                name: shard_like(value, parameters[i]) if isinstance(value, Tensor) else value
                for name, value in tensors.items()
            }
            for i, tensors in state["state"].items()
        }
    }
