"""The Accelerator of this process, which the environment cannot change."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin

from scaletune import environment
from scaletune.errors import UserError

PLAIN_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""The kinds of process groups that the loop trains with. It shards a model itself (`sharding`)."""


def accelerator() -> Accelerator:
    """The Accelerator of this process, on a GPU of its own if there are GPUs.

    Its settings do not depend on the environment (`ACCELERATE_*`, `FSDP_*`): the recipe alone
    decides what a trial computes.

    Raises:
        UserError: There are fewer GPUs than processes, a variable lowers the precision, or the
            process has an Accelerator with other settings.
    """
    environment.require_full_precision()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        require_gpus(processes)
    try:
        with environment.hidden(environment.ACCELERATE_VARIABLES):
            acc = Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision="no",  # the loop has its own autocast, `training.precision`
                dynamo_backend="no",  # the loop compiles itself, `engine.compile`
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise UserError(
            "a trial must train in a process without another Accelerator, but this process has one"
            " with other settings: restart it, or create none before"
        ) from None
    require_plain(acc)
    return acc


def require_plain(acc: Accelerator) -> None:
    """UserError if an Accelerator would change what a trial computes."""
    settings = {
        "mixed_precision": (acc.mixed_precision, "no"),
        "dynamo_backend": (acc.state.dynamo_plugin.backend.value.lower(), "no"),
    }
    for name, (value, needed) in settings.items():
        if value != needed:
            raise UserError(
                f"a trial must train with an Accelerator of {name} {needed!r}, because the recipe"
                f" sets precision and compilation, but got {value!r}: use"
                " `scaletune.training.accelerator()`"
            )
    if acc.distributed_type not in PLAIN_TYPES:
        raise UserError(
            "a trial must train with an Accelerator without FSDP, DeepSpeed or Megatron-LM, but"
            f" got {acc.distributed_type.value}: use `scaletune.training.accelerator()` and"
            " `engine.strategy`"
        )


def require_gpus(processes: int) -> None:
    """UserError if this machine has fewer GPUs than processes."""
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"`processes <= GPUs` must hold, but got {processes} processes and {gpus} GPUs"
        )
