"""How a target spreads over the GPUs it is given, and how long it takes there. Estimates, from configs and datasheets alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from scaletune.counting import flops_per_token
from scaletune.counting.memory import Split, training_memory
from scaletune.hardware import Hardware
from scaletune.recipe import Recipe
from scaletune.zoo import Blocks

ASSUMED = [
    "attention keeps no matrix of scores (fused kernels); what a fused norm or MLP would not keep is counted",
    "tensor parallelism comes with sequence parallelism (arXiv:2205.05198, section 4.2.2); experts are spread with it, not among GPUs",
    "stages of a pipeline hold equal numbers of layers and take turns one forward, one backward (arXiv:2104.04473)",
]


@dataclass(frozen=True)
class Placed:
    """A split, the bytes of its fullest GPU by part, and whether they fit."""

    split: Split
    memory: dict[str, float]
    fits: bool


def _divides(recipe: Recipe, tp: int, pp: int) -> bool:
    """Whether heads, key-value heads and the MLP divide by tp, layers by pp; what has no such blocks is split by its data alone."""
    model = recipe.model
    if not isinstance(model, Blocks):
        return tp == pp == 1
    return not (
        model.heads % tp
        or (model.kv_heads or model.heads) % tp
        or model.ffn_width % tp
        or model.depth % pp
    )


def splits(recipe: Recipe, hardware: Hardware) -> Iterator[Split]:
    """Every split that divides, smallest tp first (within a node), then smallest pp; a micro-batch is one sequence."""
    rows = recipe.budget.batch_tokens // recipe.data.seq_len
    for tp in range(1, min(hardware.gpus, hardware.gpus_per_node) + 1):
        for pp in range(1, hardware.gpus // tp + 1):
            dp, left = divmod(hardware.gpus, tp * pp)
            whole_nodes = (
                hardware.gpus <= hardware.gpus_per_node or hardware.gpus_per_node % tp == 0
            )
            if not left and whole_nodes and rows % dp == 0 and _divides(recipe, tp, pp):
                yield Split(tp, pp, dp, 1, rows // dp)


def memory_of(
    recipe: Recipe, vocab_size: int, split: Split, hardware: Hardware
) -> dict[str, float]:
    """Bytes of the fullest GPU, by part."""
    return training_memory(
        recipe.model, vocab_size, recipe.data.seq_len, split, family=recipe.optimizer.family, precision=hardware.precision,
        zero=hardware.zero, recompute=hardware.recompute,
    )  # fmt: skip


def place(recipe: Recipe, vocab_size: int, hardware: Hardware) -> Placed | None:
    """The first of `splits` that fits into the usable memory; else that which needs least; None where no split divides."""
    room, found = hardware.resolved().memory * hardware.usable, list[Placed]()
    for split in splits(recipe, hardware):
        parts = memory_of(recipe, vocab_size, split, hardware)
        found.append(Placed(split, parts, parts["total"] <= room))
        if found[-1].fits:
            return found[-1]
    return min(found, key=lambda placed: placed.memory["total"], default=None)


def undivided(recipe: Recipe, hardware: Hardware) -> str:
    """The sentence where no split divides."""
    rows, model = recipe.budget.batch_tokens // recipe.data.seq_len, recipe.model
    shape = (
        f", {model.heads} heads, {model.kv_heads or model.heads} key-value heads and {model.depth} layers"
        if isinstance(model, Blocks)
        else ""
    )
    return f"{hardware.gpus} GPUs do not divide a batch of {rows} sequences{shape}: no data, tensor and pipeline sizes have that product"


def hours(
    flops: float, hardware: Hardware, utilisation: tuple[float, float, float]
) -> dict[str, Any]:
    """GPU-hours and days of wall clock by MFU = FLOPs / (GPU-seconds * peak) (arXiv:2204.02311, App. B), and their range over it."""
    gpu = hardware.resolved()
    value, longest, shortest = (flops / (share * gpu.peak) / 3600 for share in utilisation)
    return {
        "gpu_hours": value, "gpu_hours_range": [shortest, longest], "days": value / hardware.gpus / 24,
        "days_range": [hour / hardware.gpus / 24 for hour in (shortest, longest)], "mfu": utilisation[0], "mfu_range": list(utilisation[1:]),
        "peak_flops": gpu.peak, "source": gpu.source,
    }  # fmt: skip


def floors(
    recipe: Recipe, vocab_size: int, placed: Placed, hardware: Hardware, mfu: float
) -> list[str]:
    """Sentences where bandwidth, at its datasheet peak, would take longer than the arithmetic at this MFU: the MFU is then out of reach."""
    gpu, split, parts = hardware.resolved(), placed.split, placed.memory
    compute = (
        flops_per_token(recipe.model, vocab_size, recipe.data.seq_len)
        * recipe.budget.batch_tokens
        / hardware.gpus
        / gpu.peak
        / mfu
    )
    held = sum(
        parts[name] for name in ("weights", "gradients", "optimizer_states", "master_weights")
    )
    reduced = (
        2 * (split.dp - 1) / split.dp * parts["gradients"]
    )  # of a ring; each direction has half a link's bandwidth
    floor = {
        "reading and writing weights and optimizer": 2 * held / gpu.memory_bandwidth
        if gpu.memory_bandwidth
        else 0.0,
        "reducing gradients, were all GPUs in one node,": reduced / (gpu.link_bandwidth / 2)
        if gpu.link_bandwidth
        else 0.0,
    }
    total = hardware.gpus * recipe.budget.steps / 3600
    return [
        f"{what} takes {seconds:.3g} s a step, the arithmetic {compute:.3g} s: that MFU is out of reach, GPU-hours are {seconds * total:.3g} or more"
        for what, seconds in floor.items()
        if seconds > compute
    ]


def plain(placed: Placed) -> dict[str, Any]:
    """As JSON holds it: the split, its idle share, the bytes a GPU by part."""
    return {
        "split": asdict(placed.split) | {"bubble": placed.split.bubble},
        "memory_bytes_a_gpu": placed.memory,
        "fits": placed.fits,
    }
