"""Divides the GPUs and CPU cores of a machine among the workers that train at once.

Pure functions of the numbers of GPUs and cores, so that they can be tested without GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from scaletune.errors import UserError


def gpus_per_worker(requested: int | None, processes: int, gpus: int) -> int:
    """The number of GPUs of one worker on a machine with `gpus` GPUs.

    Args:
        requested: `engine.gpus_per_trial`; None for one per process, if the machine has GPUs.
        processes: `engine.processes`.
        gpus: The GPUs of the machine that this process may use.

    Raises:
        UserError: The machine has fewer.
    """
    if requested is None:
        if gpus and processes > gpus:
            raise UserError(
                f"`processes <= GPUs` must hold, but got {processes} processes and {gpus} GPUs"
            )
        return processes if gpus else 0
    if requested > gpus:
        raise UserError(
            f"`engine.gpus_per_trial <= GPUs` must hold, but got {requested} and this machine has"
            f" {gpus}"
        )
    return requested


def count_workers(
    workers: str | int, per_worker: int, processes: int, gpus: int, cores: int
) -> int:
    """The number of workers on a machine.

    "auto": as many as its GPUs allow, or its CPU cores where a worker has no GPU.

    Raises:
        UserError: Workers with several GPUs each would need more than there are. (Workers with one
            GPU each may share it.)
    """
    if not isinstance(workers, int):
        return max(1, gpus // per_worker if per_worker else cores // processes)
    if per_worker > 1 and workers * per_worker > gpus:
        raise UserError(
            "`engine.workers * gpus_per_trial <= GPUs` must hold, but got"
            f" {workers} workers of {per_worker} GPUs each and {gpus} GPUs: lower `engine.workers`"
            f' to {gpus // per_worker}, or leave it at "auto"'
        )
    return workers


def pin_gpus(slot: int, per_worker: int, visible: Sequence[str]) -> list[str]:
    """The GPUs of the worker with index `slot`.

    Workers with one GPU share the GPUs in turn if there are more workers; the GPUs of others
    never overlap.
    """
    if per_worker == 1:
        return [visible[slot % len(visible)]] if visible else []
    return list(visible[slot * per_worker : (slot + 1) * per_worker])


def describe_sharing(workers: int, per_worker: int, gpus: int) -> str:
    """A sentence that says that workers share GPUs; empty where each has its own."""
    if per_worker != 1 or workers <= gpus:
        return ""
    return f"{workers} workers share {gpus} GPU{'s' * (gpus != 1)}"
