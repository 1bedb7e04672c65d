"""Architectures that no family of ours is: their own tensors in our roles, the transferred lr by our rules, and no proxy that tested it.

Written with --force alone, and the evidence says so. Residual branches and vocabulary are as in a transformer of the target's shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.rules import Planned, Tensor, plan, shift
from scaletune.transferring import Transfer
from scaletune.transferring.formats.granite import CANNOT, USAGE, as_llama, shape, written
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import carried, param_groups
from scaletune.zoo import Transformer

STARTS = "init std of each tensor: initialize(model) of loader.py draws them; `initializer_range` is that of hidden matrices alone"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Kind:
    """An architecture: its classes, what its layers are made of, and the config keys that are its own."""

    name: str  # of transformers' classes
    model_type: str
    what: str  # that no proxy had
    layer: Callable[[str, Transformer], Iterator[Tensor]]
    final_norm: str
    needs: int  # what head size and base width must be a multiple of
    cannot: tuple[str, ...]


def hidden(name: str, fan_out: int, fan_in: int, growing: int | None = None) -> Tensor:
    """A matrix of which `growing` rows, all unless said, grow with width: eps, which is one for all rows, is theirs."""
    return Tensor(
        f"{name}.weight",
        "hid",
        (fan_out, fan_in),
        "matrix",
        True,
        own_fans=(fan_in, growing or fan_out),
    )


def gains(name: str, size: int, growing: int | None = None) -> Tensor:
    return Tensor(name, "vec", (size,), "vector", True, own_fans=(1, growing or size))


def mlp(name: str, model: Transformer) -> Iterator[Tensor]:
    """SwiGLU, under the name that the architecture has for it."""
    for proj in ("gate_proj", "up_proj"):
        yield hidden(f"{name}.{proj}", model.ffn_width, model.width)
    yield hidden(f"{name}.down_proj", model.width, model.ffn_width)


def tensors(kind: Kind, model: Transformer, vocab_size: int) -> list[Tensor]:
    """Every parameter by its name in transformers."""
    found = [Tensor(VOCABULARY[0], "emb", (vocab_size, model.width), "embedding")]
    for i in range(model.depth):
        found += kind.layer(f"model.layers.{i}", model)
    found.append(replace(gains(kind.final_norm, model.width), in_block=False))
    return found + (
        [] if model.tied else [Tensor(VOCABULARY[1], "out", (vocab_size, model.width), "head")]
    )


def _checked(kind: Kind, transfer: Transfer) -> Transformer:
    """The model; UserError with the first thing that the architecture cannot say of it."""
    model, base_width = (
        as_llama(transfer.target.model, kind.name),
        transfer.target.parametrization.base_width,
    )
    if model.biases:
        raise UserError(f"a {kind.name} has `model.biases` False, but the target has True")
    if model.head_dim % kind.needs or base_width % kind.needs:
        raise UserError(
            f"a {kind.name} needs `head_dim` and `base_width` that are multiples of {kind.needs},"
            f" but got head_dim={model.head_dim}, base_width={base_width}"
        )
    return model


def planned(kind: Kind, transfer: Transfer) -> list[Planned]:
    """Rows of its own tensors: only embedding and head keep a multiplier, which its config has; the others' is in their weights."""
    model, t = _checked(kind, transfer), transfer.target
    base = model.model_copy(update={"width": t.parametrization.base_width})
    m_depth = model.depth / (t.parametrization.base_depth or model.depth)
    theirs, bases = (tensors(kind, of, transfer.vocab_size) for of in (model, base))
    rows = plan(theirs, bases, t.parametrization, t.optimizer, m_depth)
    return [
        row if row.name in VOCABULARY else shift(row, 1 / row.multiplier, row.family)
        for row in rows
    ]


def said(kind: Kind, transfer: Transfer) -> dict[str, Any]:
    """The evidence, with what no proxy tested."""
    model = _checked(kind, transfer)
    n = sum(
        tensor.size
        for tensor in tensors(kind, model, transfer.vocab_size)
        if tensor.name not in VOCABULARY
    )
    e = transfer.evidence
    sentence = (
        f"forced: no proxy had {kind.what}: lr is that of a transformer of n_params {e['n_params']:g}, and this model has {n:g};"
        " its tensors have roles by derivation, and its optimum is untested"
    )
    return e | {"assumptions": [*e["assumptions"], sentence]}


def emit(
    kind: Kind, transfer: Transfer, rows: list[Planned], own: dict[str, Any], folder: Path
) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    carried(transfer.target, kind.model_type)
    std = next(row.init_std for row in rows if row.name.endswith("o_proj.weight"))
    content = {"architectures": [f"{kind.name}ForCausalLM"], "model_type": kind.model_type}
    content |= shape(transfer, _checked(kind, transfer)) | {"initializer_range": std} | own
    usage = USAGE.format(
        model=f"{kind.name}ForCausalLM", config=f"{kind.name}Config", start="\ninitialize(model)"
    )
    groups = param_groups(
        replace(transfer, evidence=said(kind, transfer)), rows, [*CANNOT, STARTS, *kind.cannot]
    )
    return written(folder, {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(usage),
    })  # fmt: skip
