"""Shared by the formats whose architecture no proxy has: MiniCPM3 and Falcon-H1.

Their own tensors get the roles of the parametrization rules, and the transferred lr is scaled by
those rules. Residual branches and vocabulary are those of a transformer with the target's shape.
These formats need `force`, and the evidence states that no proxy tested them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.rules import Tensor, TensorPlan, plan, shift
from scaletune.transferring.formats.granite import (
    CANNOT,
    USAGE,
    require_llama,
    shape,
    write_files,
)
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import param_groups, require_supported
from scaletune.transferring.target import Transfer
from scaletune.zoo import TransformerConfig

INIT_STDS = (
    "init std per tensor: initialize(model) of loader.py draws the weights; `initializer_range` is"
    " the std of hidden matrices only"
)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class UntestedArch:
    """An architecture of transformers that no model family of scaletune has."""

    name: str
    """Prefix of transformers' class names."""

    model_type: str
    """`model_type` in config.json."""

    what: str
    """The part that no proxy had, for messages."""

    layer: Callable[[str, TransformerConfig], Iterator[Tensor]]
    """(name of a layer, model) -> the layer's tensors."""

    final_norm: str
    """Name of the final norm's gain."""

    multiple_of: int
    """Head size and base width must be multiples of this."""

    cannot: tuple[str, ...]
    """What the config cannot hold, as sentences."""


def hidden_matrix(name: str, fan_out: int, fan_in: int, growing: int | None = None) -> Tensor:
    """A hidden matrix. `growing`: how many rows grow with width; they determine its eps."""
    own_fans = (fan_in, growing or fan_out)
    return Tensor(f"{name}.weight", "hid", (fan_out, fan_in), "matrix", True, own_fans=own_fans)


def gain(name: str, size: int, growing: int | None = None) -> Tensor:
    """A gain or bias vector."""
    return Tensor(name, "vec", (size,), "vector", True, own_fans=(1, growing or size))


def mlp(name: str, model: TransformerConfig) -> Iterator[Tensor]:
    """The tensors of a SwiGLU block."""
    for proj in ("gate_proj", "up_proj"):
        yield hidden_matrix(f"{name}.{proj}", model.ffn_width, model.width)
    yield hidden_matrix(f"{name}.down_proj", model.width, model.ffn_width)


def tensors(arch: UntestedArch, model: TransformerConfig, vocab_size: int) -> list[Tensor]:
    """All parameters by their names in transformers."""
    embedding, head = VOCABULARY
    own = [Tensor(embedding, "emb", (vocab_size, model.width), "embedding")]
    for i in range(model.depth):
        own += arch.layer(f"model.layers.{i}", model)
    own.append(replace(gain(arch.final_norm, model.width), in_block=False))
    if not model.tied:
        own.append(Tensor(head, "out", (vocab_size, model.width), "head"))
    return own


def _require(arch: UntestedArch, transfer: Transfer) -> TransformerConfig:
    """Returns the model if the architecture can have its shape; otherwise UserError."""
    model = require_llama(transfer.target.model, arch.name)
    base_width = transfer.target.parametrization.base_width
    if model.biases:
        raise UserError(f"{arch.name} needs `model.biases` False, but the target has True")
    if model.head_dim % arch.multiple_of or base_width % arch.multiple_of:
        raise UserError(
            f"{arch.name} needs a `head_dim` and a `base_width` that are multiples of"
            f" {arch.multiple_of}, but got head_dim={model.head_dim}, base_width={base_width}"
        )
    return model


def plan_tensors(arch: UntestedArch, transfer: Transfer) -> list[TensorPlan]:
    """Rows of the architecture's tensors.

    Embedding and head keep their multiplier, for which the config has keys. Other multipliers are
    folded into the weights.
    """
    model, t = _require(arch, transfer), transfer.target
    base = model.model_copy(update={"width": t.parametrization.base_width})
    m_depth = model.depth / (t.parametrization.base_depth or model.depth)
    own, of_base = (tensors(arch, each, transfer.vocab_size) for each in (model, base))
    rows = plan(own, of_base, t.parametrization, t.optimizer, m_depth)
    return [
        row if row.name in VOCABULARY else shift(row, 1 / row.multiplier, row.family)
        for row in rows
    ]


def add_assumption(arch: UntestedArch, transfer: Transfer) -> dict[str, Any]:
    """The evidence with a sentence that no proxy tested this architecture."""
    model = _require(arch, transfer)
    own = tensors(arch, model, transfer.vocab_size)
    n_params = sum(tensor.size for tensor in own if tensor.name not in VOCABULARY)
    e = transfer.evidence
    sentence = (
        f"forced: no proxy had {arch.what}. The lr is that of a transformer with n_params"
        f" {e['n_params']:g}; this model has {n_params:g}. The roles of its tensors are derived,"
        " and its optimum is untested"
    )
    return e | {"assumptions": [*e["assumptions"], sentence]}


def emit(
    arch: UntestedArch,
    transfer: Transfer,
    rows: list[TensorPlan],
    own: dict[str, Any],
    folder: Path,
) -> list[Path]:
    """Writes config.json, param_groups.json and loader.py.

    Args:
        arch: The architecture.
        transfer: The transfer that is emitted.
        rows: The plan of the architecture's tensors.
        own: Config keys of this architecture alone.
        folder: Where the files go.
    """
    require_supported(transfer.target, arch.model_type)
    std = next(row.init_std for row in rows if row.name.endswith("o_proj.weight"))
    content = {"architectures": [f"{arch.name}ForCausalLM"], "model_type": arch.model_type}
    content |= shape(transfer, _require(arch, transfer)) | {"initializer_range": std} | own
    model, config = f"{arch.name}ForCausalLM", f"{arch.name}Config"
    usage = USAGE.format(model=model, config=config, start="\ninitialize(model)")
    evident = replace(transfer, evidence=add_assumption(arch, transfer))
    groups = param_groups(evident, rows, [*CANNOT, INIT_STDS, *arch.cannot])
    texts = {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(usage),
    }
    return write_files(folder, texts)
