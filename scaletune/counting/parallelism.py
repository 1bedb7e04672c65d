"""How a target can be split over GPUs, and how long it trains there.

Estimates from configs and datasheets only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from scaletune.counting import flops_per_token
from scaletune.counting.memory import Split, training_memory
from scaletune.hardware import Hardware
from scaletune.recipe import Recipe
from scaletune.zoo import BlocksConfig

ASSUMPTIONS = [
    "attention stores no matrix of scores (fused kernels); what a fused norm or MLP would not store"
    " is counted",
    "tensor parallelism includes sequence parallelism (arXiv:2205.05198, section 4.2.2) and splits"
    " experts; there is no expert parallelism",
    "pipeline stages hold equal numbers of layers and alternate one forward, one backward"
    " (arXiv:2104.04473)",
]


@dataclass(frozen=True)
class Placement:
    """A split, the bytes of its fullest GPU by part, and whether they fit."""

    split: Split
    memory: dict[str, float]
    fits: bool


def _divides(recipe: Recipe, tp: int, pp: int) -> bool:
    """Whether heads, key-value heads and MLP divide by tp, and layers by pp.

    A model without such blocks has only data parallelism.
    """
    model = recipe.model
    if not isinstance(model, BlocksConfig):
        return tp == pp == 1
    return not (
        model.heads % tp
        or (model.kv_heads or model.heads) % tp
        or model.ffn_width % tp
        or model.depth % pp
    )


def splits(recipe: Recipe, hardware: Hardware) -> Iterator[Split]:
    """Every split that divides, smallest tp first (within a node), then smallest pp.

    A micro-batch is one sequence.
    """
    rows = recipe.budget.batch_tokens // recipe.data.seq_len
    for tp in range(1, min(hardware.gpus, hardware.gpus_per_node) + 1):
        for pp in range(1, hardware.gpus // tp + 1):
            dp, remainder = divmod(hardware.gpus, tp * pp)
            whole_nodes = (
                hardware.gpus <= hardware.gpus_per_node or hardware.gpus_per_node % tp == 0
            )
            if not remainder and whole_nodes and rows % dp == 0 and _divides(recipe, tp, pp):
                yield Split(tp, pp, dp, 1, rows // dp)


def gpu_memory(
    recipe: Recipe, vocab_size: int, split: Split, hardware: Hardware
) -> dict[str, float]:
    """Bytes of the fullest GPU by part."""
    return training_memory(
        recipe.model,
        vocab_size,
        recipe.data.seq_len,
        split,
        family=recipe.optimizer.family,
        precision=hardware.precision,
        zero=hardware.zero,
        recompute=hardware.recompute,
    )


def choose_split(recipe: Recipe, vocab_size: int, hardware: Hardware) -> Placement | None:
    """The first split that fits into the usable memory, else the one that needs least.

    None if no split divides.
    """
    available, placements = hardware.gpu_spec().memory * hardware.usable, list[Placement]()
    for split in splits(recipe, hardware):
        parts = gpu_memory(recipe, vocab_size, split, hardware)
        placement = Placement(split, parts, parts["total"] <= available)
        if placement.fits:
            return placement
        placements.append(placement)
    return min(placements, key=lambda placement: placement.memory["total"], default=None)


def no_split_message(recipe: Recipe, hardware: Hardware) -> str:
    """The message where no split divides."""
    rows, model = recipe.budget.batch_tokens // recipe.data.seq_len, recipe.model
    shape = (
        f", {model.heads} heads, {model.kv_heads or model.heads} key-value heads and"
        f" {model.depth} layers"
        if isinstance(model, BlocksConfig)
        else ""
    )
    return (
        f"{hardware.gpus} GPUs do not divide a batch of {rows} sequences{shape}: no data, tensor"
        " and pipeline parallel sizes have that product"
    )


def hours(
    flops: float, hardware: Hardware, utilisation: tuple[float, float, float]
) -> dict[str, Any]:
    """GPU-hours and days by MFU = FLOPs / (GPU-seconds * peak) (arXiv:2204.02311, App. B).

    Args:
        flops: Training FLOPs.
        hardware: The GPUs.
        utilisation: MFU, and its lowest and highest value.
    """
    gpu = hardware.gpu_spec()
    value, longest, shortest = (flops / (share * gpu.peak) / 3600 for share in utilisation)
    return {
        "gpu_hours": value,
        "gpu_hours_range": [shortest, longest],
        "days": value / hardware.gpus / 24,
        "days_range": [hour / hardware.gpus / 24 for hour in (shortest, longest)],
        "mfu": utilisation[0],
        "mfu_range": list(utilisation[1:]),
        "peak_flops": gpu.peak,
        "source": gpu.source,
    }


def bandwidth_warnings(
    recipe: Recipe, vocab_size: int, placement: Placement, hardware: Hardware, mfu: float
) -> list[str]:
    """A warning where bandwidth at its datasheet peak limits a step more than FLOPs at this MFU.

    Then the MFU cannot be reached.
    """
    gpu, split, parts = hardware.gpu_spec(), placement.split, placement.memory
    compute = (
        flops_per_token(recipe.model, vocab_size, recipe.data.seq_len)
        * recipe.budget.batch_tokens
        / hardware.gpus
        / gpu.peak
        / mfu
    )
    states = ("weights", "gradients", "optimizer_states", "master_weights")
    moved = sum(parts[name] for name in states)
    # of a ring; each direction has half of the link bandwidth
    reduced = 2 * (split.dp - 1) / split.dp * parts["gradients"]
    least = {
        "reading and writing weights and optimizer states": 2 * moved / gpu.memory_bandwidth
        if gpu.memory_bandwidth
        else 0.0,
        "reducing gradients, if all GPUs were in one node,": reduced / (gpu.link_bandwidth / 2)
        if gpu.link_bandwidth
        else 0.0,
    }
    total = hardware.gpus * recipe.budget.steps / 3600
    return [
        f"{what} takes at least {seconds:.3g} s per step, more than the {compute:.3g} s of compute:"
        f" this MFU cannot be reached; expect at least {seconds * total:.3g} GPU-hours"
        for what, seconds in least.items()
        if seconds > compute
    ]


def to_plain(placement: Placement) -> dict[str, Any]:
    """The split, its bubble and the bytes per GPU by part, as plain values."""
    return {
        "split": asdict(placement.split) | {"bubble": placement.split.bubble},
        "memory_bytes_a_gpu": placement.memory,
        "fits": placement.fits,
    }
