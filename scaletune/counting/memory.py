"""Memory of training on many GPUs, by part and by GPU: weights, gradients, optimizer states, master weights, activations. Estimates, from configs alone.

Tensor parallelism divides every matrix and, with sequence parallelism, every activation (arXiv:2205.05198, eq. 4); pipeline stages hold
depth / pp layers, the first as many micro-batches in flight as there are stages (its section 4.2.3); ZeRO-1 spreads what the optimizer keeps
and the master weights over the data-parallel GPUs (arXiv:1910.02054, section 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from scaletune.counting import kept_floats
from scaletune.counting.families import activations, layer_floats, tensors
from scaletune.rules import Tensor
from scaletune.zoo import Blocks, Decoder, Model

PRECISIONS = {  # bytes of a weight, a gradient, a master weight, an activation
    "mixed": (
        2,
        2,
        4,
        2,
    ),  # bfloat16 with float32 master weights (arXiv:1910.02054, section 3.1: 2 + 2 + K, K = 12 of Adam)
    "autocast": (4, 4, 0, 2),  # float32 weights, bfloat16 activations: torch.autocast
    "float32": (4, 4, 0, 4),
}
STATE = 4  # bytes of a number an optimizer keeps
LOGIT = 4  # the loss is float32 in every precision


@dataclass(frozen=True)
class Split:
    """How a model and its batch are spread: tp * pp * dp GPUs, each dp group taking `micro_batches` of `micro_rows` sequences a step."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_rows: int = 1
    micro_batches: int = 1

    @property
    def bubble(self) -> float:
        """Share of a step that pipeline stages idle: (pp - 1) / (micro_batches + pp - 1) (arXiv:2104.04473, section 2.2)."""
        return (self.pp - 1) / (self.micro_batches + self.pp - 1)


def _stage(tensor: Tensor, model: Model, pp: int) -> set[int]:
    """The stages that hold a tensor: a layer's its own, the embedding the first, all behind the layers the last; a tied table both."""
    part = tensor.name.split(".layers.")
    if len(part) > 1 and pp > 1:
        return {int(part[1].split(".")[0]) * pp // model.depth}
    if tensor.group == "embedding" and isinstance(model, Decoder) and model.tied:
        return {0, pp - 1}
    return {0} if tensor.group == "embedding" else {pp - 1}


def _held(model: Model, vocab_size: int, family: str, split: Split) -> list[tuple[float, float]]:
    """(weights, floats the optimizer keeps) of one GPU of each stage; vectors and norms are on every tensor-parallel GPU."""
    held = [(0.0, 0.0)] * split.pp
    for tensor in tensors(model, vocab_size):
        share = split.tp if tensor.role not in ("vec", "fin") else 1
        for stage in _stage(tensor, model, split.pp):
            weights, kept = held[stage]
            held[stage] = weights + tensor.size / share, kept + kept_floats(tensor, family) / share
    return held


def _activations(
    model: Model, vocab_size: int, seq_len: int, split: Split, precision: str, recompute: bool
) -> list[float]:
    """Bytes each stage keeps for the backward pass; recomputed layers keep their input, and one is whole while it is redone."""
    tokens, each = split.micro_rows * seq_len, PRECISIONS[precision][3]
    if not isinstance(model, Blocks):
        return [float(each * tokens * activations(model, vocab_size))]
    rows, layer, layers = (
        tokens if isinstance(model, Decoder) else tokens * model.tokens,
        layer_floats(model),
        model.depth / split.pp,
    )
    outside = (
        tokens * (activations(model, vocab_size) - vocab_size) - rows * layer * model.depth
    )  # the final norm, an image
    found = []
    for stage in range(split.pp):
        flying = layers * min(split.pp - stage, split.micro_batches)
        kept = flying * model.width + layer if recompute else flying * layer
        last = stage == split.pp - 1
        ends = outside * each + tokens * vocab_size * LOGIT if last else 0.0
        found.append((rows * kept * each + ends) / split.tp)
    return found


def training_memory(
    model: Model, vocab_size: int, seq_len: int, split: Split, *,
    family: str = "adamw", precision: str = "mixed", zero: int = 0, recompute: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Bytes of the fullest GPU by part, and their `total`."""
    weight, gradient, master, _ = PRECISIONS[precision]
    spread = split.dp if zero else 1
    stages = []
    held, passed = (
        _held(model, vocab_size, family, split),
        _activations(model, vocab_size, seq_len, split, precision, recompute),
    )
    for (weights, kept), backward in zip(held, passed, strict=True):
        parts = {
            "weights": weight * weights, "gradients": gradient * weights, "optimizer_states": STATE * kept / spread,
            "master_weights": master * weights / spread, "activations": backward,
        }  # fmt: skip
        stages.append(parts | {"total": sum(parts.values())})
    return max(stages, key=lambda parts: parts["total"])
