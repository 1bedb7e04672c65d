"""Processes: this one's Accelerator, and a trial over several processes of this machine."""

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
from scaletune.training.trials import trial

_OURS = "UserError: "  # how a rank's message begins when the user can mend it


def accelerator() -> Accelerator:
    """This process's Accelerator: a GPU when there is one, its own when several processes are on this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        _require_gpus(here)
    return Accelerator(cpu=not torch.cuda.is_available())


def _require_gpus(processes: int) -> None:
    if processes > torch.cuda.device_count():
        raise UserError(
            f"`processes <= GPUs` must hold, but got {processes} processes and {torch.cuda.device_count()} GPUs"
        )


def launched(
    recipe: Recipe, sweep: str, progress: Callable[[float], None] = lambda share: None
) -> tuple[Trial, list[float]]:
    """`trial` over `engine.processes` processes started here, a GPU each where there are any; they end when this one does."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = recipe.engine.processes
    if torch.cuda.is_available():
        _require_gpus(processes)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"scaletune-{os.getpid()}", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="spawn", monitor_interval=0.1,
    )  # fmt: skip
    _clean_up_after_us()
    shares = torch.multiprocessing.get_context("spawn").SimpleQueue()
    listener = threading.Thread(target=_tell, args=(shares, progress), daemon=True)
    listener.start()
    try:
        return elastic_launch(config, _rank)(recipe.model_dump(), sweep, os.getpid(), shares)[0]
    except ChildFailedError as error:
        message: Any = error.get_first_failure()[
            1
        ].message  # declared a string, but a record of a raised error is a dict
        said = str(message.get("message") if isinstance(message, dict) else message)
        if not said.startswith(_OURS):
            raise
        raise UserError(said.removeprefix(_OURS)) from None
    finally:
        shares.put(None)
        listener.join()


def _clean_up_after_us() -> None:
    """Start what unlinks the semaphores of processes that are killed: outside the group that we lead, whose kill would take it too."""
    leads = os.getpgrp() == os.getpid()
    with suppress(OSError):  # a session's leader stays where it is
        if leads:
            os.setpgid(0, os.getpgid(os.getppid()))
    resource_tracker.ensure_running()
    with suppress(OSError):
        if leads:
            os.setpgid(0, 0)


def _tell(shares: Any, progress: Callable[[float], None]) -> None:
    for share in iter(shares.get, None):
        progress(share)


def _rank(
    content: dict[str, Any], sweep: str, parent: int, shares: Any
) -> tuple[Trial, list[float]]:
    """One process of a launched trial."""
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    acc = accelerator()
    said = 0.0

    def progress(share: float) -> None:
        nonlocal said
        if acc.is_main_process and time.monotonic() - said > 0.25:
            said = time.monotonic()
            shares.put(share)

    try:
        return trial(recipes.validated(content, "point"), sweep, acc, progress)
    finally:
        torch.distributed.destroy_process_group()


def _leave_with(parent: int) -> None:
    """End this process when the one that launched it is gone: a killed launcher would leave its ranks on the GPUs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
