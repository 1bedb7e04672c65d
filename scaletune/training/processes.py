"""The Accelerator of this process, and trials that train over several processes of this machine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import resource_tracker
from typing import Any

import torch
from accelerate import Accelerator

from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Trial
from scaletune.training.trials import run_trial

_USER_ERROR = "UserError: "
"""Prefix of a process's error message if it is a UserError."""


def accelerator() -> Accelerator:
    """The Accelerator of this process, on a GPU of its own if there are GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        _require_gpus(processes)
    return Accelerator(cpu=not torch.cuda.is_available())


def _require_gpus(processes: int) -> None:
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"`processes <= GPUs` must hold, but got {processes} processes and {gpus} GPUs"
        )


def launch_trial(
    recipe: Recipe, sweep: str, progress: Callable[[float], None] = lambda share: None
) -> tuple[Trial, list[float]]:
    """`run_trial` over `engine.processes` new processes, each with its own GPU if there are GPUs.

    The processes end when this process ends.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = recipe.engine.processes
    if torch.cuda.is_available():
        _require_gpus(processes)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"scaletune-{os.getpid()}",
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        monitor_interval=0.1,
    )
    _start_resource_tracker()
    shares = torch.multiprocessing.get_context("spawn").SimpleQueue()
    listener = threading.Thread(target=_forward_progress, args=(shares, progress), daemon=True)
    listener.start()
    try:
        return elastic_launch(config, _rank)(recipe.model_dump(), sweep, os.getpid(), shares)[0]
    except ChildFailedError as error:
        # Annotated as a string, but a dict if the process raised an error.
        content: Any = error.get_first_failure()[1].message
        message = str(content.get("message") if isinstance(content, dict) else content)
        if not message.startswith(_USER_ERROR):
            raise
        raise UserError(message.removeprefix(_USER_ERROR)) from None
    finally:
        shares.put(None)
        listener.join()


def _start_resource_tracker() -> None:
    """Starts multiprocessing's resource tracker outside our process group.

    It unlinks the semaphores of processes that are killed. If this process leads its group, a kill
    of the group would also kill a tracker inside it.
    """
    is_leader = os.getpgrp() == os.getpid()
    with suppress(OSError):  # the leader of a session cannot change its group
        if is_leader:
            os.setpgid(0, os.getpgid(os.getppid()))
    resource_tracker.ensure_running()
    with suppress(OSError):
        if is_leader:
            os.setpgid(0, 0)


def _forward_progress(shares: Any, progress: Callable[[float], None]) -> None:
    for share in iter(shares.get, None):
        progress(share)


def _rank(
    content: dict[str, Any], sweep: str, parent: int, shares: Any
) -> tuple[Trial, list[float]]:
    """The entry point of one process of a launched trial."""
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    acc = accelerator()
    last_report = 0.0

    def progress(share: float) -> None:
        nonlocal last_report
        if acc.is_main_process and time.monotonic() - last_report > 0.25:
            last_report = time.monotonic()
            shares.put(share)

    try:
        return run_trial(recipes.validate_recipe(content, "point"), sweep, acc, progress)
    finally:
        torch.distributed.destroy_process_group()


def _exit_with_parent(parent: int) -> None:
    """Exits when the launching process is gone; else a killed launcher would leave its processes.

    They would keep their GPUs.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
