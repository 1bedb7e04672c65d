"""Environment variables that a trial must not depend on: launchers', Accelerate's, precision's.

A trial's identity is its recipe point, so nothing in the environment may change what it computes.
Workers start without these variables. In a process that the user has started, Accelerate does not
see its variables (`hidden`), and a variable that lowers the precision is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from scaletune.errors import UserError

LAUNCH_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *("MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED"),
    *("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_"),
)
"""Variables, and prefixes of variables, of a surrounding distributed launch.

A process that inherits them waits for peers that do not exist.
"""

ACCELERATE_VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
"""Prefixes of the variables that `Accelerator()` reads its defaults from."""

PRECISION_VARIABLES = {
    "NVIDIA_TF32_OVERRIDE": (),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("0", "false", "n", "no", "off"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("STRICT",),
    "DNNL_DEFAULT_FPMATH_MODE": ("STRICT",),
    "TORCHINDUCTOR_USE_FAST_MATH": ("0",),
    "XLA_USE_BF16": ("0",),
    "XLA_DOWNCAST_BF16": ("0",),
}
"""Variables that lower the precision of float32 -> their values that do not.

They are read by cuBLAS, torch, oneDNN and XLA when these load.
"""


def launch_variables(environment: Mapping[str, str]) -> list[str]:
    """The variables of a surrounding distributed launch that are set."""
    return _matching(environment, LAUNCH_VARIABLES)


def foreign_variables(environment: Mapping[str, str]) -> list[str]:
    """All variables that are set and must not reach a trial."""
    return _matching(environment, (*LAUNCH_VARIABLES, *ACCELERATE_VARIABLES, *PRECISION_VARIABLES))


def _matching(environment: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    """The variables with one of the names; a name that ends in an underscore is a prefix."""
    prefixes = tuple(name for name in names if name.endswith("_"))
    return [name for name in environment if name in names or name.startswith(prefixes)]


def trial_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that trains: without the variables that could change it."""
    removed = set(foreign_variables(environment))
    return {name: value for name, value in environment.items() if name not in removed}


@contextmanager
def hidden(
    names: tuple[str, ...], environment: MutableMapping[str, str] = os.environ
) -> Iterator[None]:
    """Inside this context the variables, and those with one of the prefixes, are not set.

    What the block itself sets of them is removed at its end.
    """
    kept = {name: environment[name] for name in _matching(environment, names)}
    for name in kept:
        del environment[name]
    try:
        yield
    finally:
        for name in _matching(environment, names):
            del environment[name]
        environment.update(kept)


def require_full_precision(environment: Mapping[str, str] = os.environ) -> None:
    """UserError if a variable lowers the precision of this process."""
    for name, harmless in PRECISION_VARIABLES.items():
        value = environment.get(name, "")
        if value and value.upper() not in map(str.upper, harmless):
            raise UserError(
                f"`{name}` must not be set where a trial trains, because it changes losses under"
                f" the same trial id, but got {value!r}: unset it; `training.precision` of the"
                " recipe sets the precision"
            )


def note_ignored_precision(environment: Mapping[str, str] = os.environ) -> None:
    """Says on stderr that a precision which the launcher requests has no effect."""
    value = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if value.lower() != "no":
        print(
            f"ACCELERATE_MIXED_PRECISION={value} has no effect: `training.precision` of the recipe"
            " sets the precision",
            file=sys.stderr,
        )


def require_one_process(environment: Mapping[str, str] = os.environ) -> None:
    """UserError if a launcher has started this program in several processes."""
    processes = environment.get("WORLD_SIZE", "1")
    if processes.isdigit() and int(processes) > 1:
        raise UserError(
            f"a sweep must be started in one process, but WORLD_SIZE is {processes}: start the"
            " script with `python`, and set `engine.processes` (GPUs per trial) and"
            " `engine.workers` (trials at a time) in the recipe"
        )


def leave_launch(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process of a launch (torchrun, accelerate launch) has nothing to do.

    Rank 0 of a launch on one machine runs the command alone and forgets the launch: its workers
    are processes of their own. The other ranks end.

    Raises:
        UserError: The launch spans several machines.
    """
    world, local = environment.get("WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", "")
    if not world.isdigit() or int(world) < 2:
        return False
    if local and local != world:
        raise UserError(
            f"a launcher must start scaletune on one machine, but it started {world} processes of"
            f" which {local} are here: run `scaletune` without a launcher, with"
            ' `engine.kind = "slurm"` or "ray" for several machines'
        )
    if environment.get("RANK", "0") != "0":
        return True
    print(
        f"scaletune: a launcher started {world} processes; the first runs the command with workers"
        " of its own, the others end",
        file=sys.stderr,
    )
    for name in launch_variables(environment):
        del environment[name]
    return False
