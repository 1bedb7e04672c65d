"""Rules of the `engine` table that depend on the rest of the recipe: devices, nodes, strategy."""

from __future__ import annotations

from scaletune.recipe.tables import RecipeTables

ENTRYWISE_FAMILIES = ("adamw", "sgd", "lion", "adam_atan2", "schedulefree_adamw")
"""Optimizer families that update each entry of a tensor on its own, so a shard needs no other."""


def check_devices(recipe: RecipeTables) -> None:
    """ValueError if the trainer of the recipe cannot use the devices that `engine` gives it."""
    _check_gpus(recipe)
    _check_nodes(recipe)
    if recipe.engine.strategy == "fsdp" and not recipe.foreign:
        _check_sharding(recipe)


def _check_gpus(recipe: RecipeTables) -> None:
    engine = recipe.engine
    gpus = engine.slurm.gpus_per_trial if engine.gpus_per_trial == "auto" else engine.gpus_per_trial
    if not recipe.foreign and gpus not in (0, engine.processes):
        name = "engine." + "slurm." * (engine.gpus_per_trial == "auto") + "gpus_per_trial"
        raise ValueError(
            f"`{name}` must be 0 or `engine.processes` (a process trains on one GPU), but got"
            f" gpus_per_trial={gpus}, processes={engine.processes}"
        )


def _check_nodes(recipe: RecipeTables) -> None:
    nodes, kind = recipe.engine.nodes_per_trial, recipe.engine.kind
    if nodes == 1:
        return
    if not recipe.trainer.command:
        raise ValueError(
            "`engine.nodes_per_trial` of more than 1 needs `trainer.command`, because scaletune's"
            f" own processes and a function run on one machine, but got {nodes}"
        )
    if kind != "slurm":
        raise ValueError(
            "`engine.nodes_per_trial` of more than 1 needs `engine.kind = 'slurm'`, whose srun"
            f" starts the command's processes on all nodes, but got {nodes} with kind={kind!r}"
        )


def _check_sharding(recipe: RecipeTables) -> None:
    """What cannot be computed from shards, or makes no sense without processes."""
    engine, rule = recipe.engine, "`engine.strategy = 'fsdp'` needs"
    if engine.processes == 1:
        raise ValueError(f"{rule} `engine.processes` of 2 or more, but got 1")
    if recipe.optimizer.family not in ENTRYWISE_FAMILIES:
        raise ValueError(
            f"{rule} an optimizer that updates each entry on its own"
            f" ({', '.join(ENTRYWISE_FAMILIES)}), but got {recipe.optimizer.family!r}, which needs"
            " whole tensors: use 'ddp'"
        )
    for name, value in {
        "schedule.ema_half_life": recipe.schedule.ema_half_life,
        "engine.noise_every": engine.noise_every,
        "engine.compile": engine.compile,
    }.items():
        if value:
            raise ValueError(f"{rule} a recipe without `{name}`, but got {value}: use 'ddp'")
