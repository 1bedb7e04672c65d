"""Memory of training on many GPUs by part, estimated from configs.

Parts: weights, gradients, optimizer states, master weights, activations. Tensor parallelism
divides every matrix and, with sequence parallelism, every activation (arXiv:2205.05198, eq. 4). A
pipeline stage holds depth / pp layers; the first has as many micro-batches in flight as there are
stages (its section 4.2.3). ZeRO-1 divides optimizer states and master weights between the
data-parallel GPUs (arXiv:1910.02054, section 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from scaletune.counting import optimizer_floats
from scaletune.counting.families import activations, layer_floats, tensors
from scaletune.rules import Tensor
from scaletune.zoo import BlocksConfig, DecoderConfig, Model

PRECISIONS = {  # bytes of a weight, a gradient, a master weight, an activation
    # bfloat16, float32 master weights (arXiv:1910.02054, section 3.1: 2 + 2 + K, K = 12 of Adam)
    "mixed": (2, 2, 4, 2),
    "autocast": (4, 4, 0, 2),  # float32 weights, bfloat16 activations: torch.autocast
    "float32": (4, 4, 0, 4),
}
STATE = 4  # bytes of one float of an optimizer state
LOGIT = 4  # bytes; the loss is float32 in every precision


@dataclass(frozen=True)
class Split:
    """How a model and its batch are split over tp * pp * dp GPUs."""

    tp: int = 1
    """Tensor-parallel GPUs."""
    pp: int = 1
    """Pipeline stages."""
    dp: int = 1
    """Data-parallel groups."""
    micro_rows: int = 1
    """Sequences per micro-batch."""
    micro_batches: int = 1
    """Micro-batches per step of each data-parallel group."""

    @property
    def bubble(self) -> float:
        """Share of a step that pipeline stages idle (arXiv:2104.04473, section 2.2).

        (pp - 1) / (micro_batches + pp - 1).
        """
        return (self.pp - 1) / (self.micro_batches + self.pp - 1)


def _stage(tensor: Tensor, model: Model, pp: int) -> set[int]:
    """The stages that hold a tensor.

    A layer is in its own stage, the embedding in the first, what follows the layers in the last; a
    tied embedding is in both.
    """
    part = tensor.name.split(".layers.")
    if len(part) > 1 and pp > 1:
        return {int(part[1].split(".")[0]) * pp // model.depth}
    if tensor.group == "embedding" and isinstance(model, DecoderConfig) and model.tied:
        return {0, pp - 1}
    return {0} if tensor.group == "embedding" else {pp - 1}


def _weights_and_states(
    model: Model, vocab_size: int, family: str, split: Split
) -> list[tuple[float, float]]:
    """(weights, optimizer floats) of one GPU of each stage.

    Every tensor-parallel GPU holds all vectors and norms.
    """
    stages = [(0.0, 0.0)] * split.pp
    for tensor in tensors(model, vocab_size):
        share = split.tp if tensor.role not in ("vec", "fin") else 1
        for stage in _stage(tensor, model, split.pp):
            weights, states = stages[stage]
            stages[stage] = (
                weights + tensor.size / share,
                states + optimizer_floats(tensor, family) / share,
            )
    return stages


def _activations(
    model: Model, vocab_size: int, seq_len: int, split: Split, precision: str, recompute: bool
) -> list[float]:
    """Bytes that each stage stores for the backward pass.

    A recomputed layer stores its input; one layer at a time is stored whole.
    """
    tokens, each = split.micro_rows * seq_len, PRECISIONS[precision][3]
    if not isinstance(model, BlocksConfig):
        return [float(each * tokens * activations(model, vocab_size))]
    rows = tokens if isinstance(model, DecoderConfig) else tokens * model.tokens
    layer, layers = layer_floats(model), model.depth / split.pp
    # the final norm, an image
    outside = tokens * (activations(model, vocab_size) - vocab_size) - rows * layer * model.depth
    stages = []
    for stage in range(split.pp):
        in_flight = layers * min(split.pp - stage, split.micro_batches)
        floats = in_flight * model.width + layer if recompute else in_flight * layer
        last = stage == split.pp - 1
        ends = outside * each + tokens * vocab_size * LOGIT if last else 0.0
        stages.append((rows * floats * each + ends) / split.tp)
    return stages


def training_memory(
    model: Model,
    vocab_size: int,
    seq_len: int,
    split: Split,
    *,
    family: str = "adamw",
    precision: str = "mixed",
    zero: int = 0,
    recompute: bool = False,
) -> dict[str, float]:
    """Bytes of the fullest GPU by part, and their `total`."""
    weight, gradient, master, _ = PRECISIONS[precision]
    shards = split.dp if zero else 1
    tensors_of_stage = _weights_and_states(model, vocab_size, family, split)
    activations_of_stage = _activations(model, vocab_size, seq_len, split, precision, recompute)
    stages = []
    for (weights, states), stored in zip(tensors_of_stage, activations_of_stage, strict=True):
        parts = {
            "weights": weight * weights,
            "gradients": gradient * weights,
            "optimizer_states": STATE * states / shards,
            "master_weights": master * weights / shards,
            "activations": stored,
        }
        stages.append(parts | {"total": sum(parts.values())})
    return max(stages, key=lambda parts: parts["total"])
