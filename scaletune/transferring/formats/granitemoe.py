"""Hugging Face GraniteMoe, and GraniteMoeShared where every token has experts too: for recipes of the family `moe`.

Granite's keys with its one-std shift. A router has no multiplier there: where it is a readout, its own is written into its weights, so
`loader.py` draws it. Read in transformers 5.23.0: the chosen experts' softmax is over the chosen alone, which is `norm_top_k`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.rules import Planned
from scaletune.transferring import Transfer, one_std
from scaletune.transferring.formats.granite import CANNOT, USAGE, scalars, shape, written
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import LOADED, carried, param_groups
from scaletune.zoo import Model, MoE

IS = {"norm": "rms", "positions": "rotary", "qk_norm": False, "norm_top_k": True}
NAMES = {  # the end of a name in ours -> in theirs, who keep gate and up in one tensor
    "mlp.gate.weight": "block_sparse_moe.router.weight", "mlp.experts.gate_proj.weight": "block_sparse_moe.experts.gate_up_proj",
    "mlp.experts.up_proj.weight": "block_sparse_moe.experts.gate_up_proj", "mlp.experts.down_proj.weight": "block_sparse_moe.experts.down_proj",
    "mlp.shared_experts.gate_proj.weight": "shared_mlp.input_linear.weight", "mlp.shared_experts.up_proj.weight": "shared_mlp.input_linear.weight",
    "mlp.shared_experts.down_proj.weight": "shared_mlp.output_linear.weight",
}  # fmt: skip
STARTS = "init std of the router: initialize(model) of loader.py draws it; `initializer_range` is that of every other matrix"
COUNTED = "the load-balance loss is part of the loss that transformers reports: ours, and the proxies', is nats per token alone"


def as_granitemoe(model: Model) -> MoE:
    """The model; UserError with the first thing that a GraniteMoe's config cannot say."""
    if not isinstance(model, MoE):
        raise UserError(
            f"a GraniteMoe config must be of a 'moe', but got `model.family` {model.family!r}"
        )
    for key, value in IS.items():
        if getattr(model, key) != value:
            raise UserError(
                f"a GraniteMoe has `model.{key}` {value!r}, but the target has {getattr(model, key)!r}"
            )
    return model


def name_in(name: str) -> str:
    """Our name of a tensor in theirs."""
    block, _, end = name.rpartition("mlp.")
    return block + NAMES[f"mlp.{end}"] if f"mlp.{end}" in NAMES else name


def renamed(rows: Sequence[Planned]) -> list[Planned]:
    """The rows of their tensors; the two halves of a packed one are planned alike."""
    return list({name_in(row.name): replace(row, name=name_in(row.name)) for row in rows}.values())


def config(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """config.json of a GraniteMoeForCausalLM or GraniteMoeSharedForCausalLM; every key is a declared field of its config."""
    model = as_granitemoe(transfer.target.model)
    kind = {"architectures": [f"{_class(model)}ForCausalLM"], "model_type": _class(model).lower()}
    common = {key: value for key, value in shape(transfer, model).items() if key != "mlp_bias"}
    return kind | common | scalars(rows, multipliers) | {
        "num_local_experts": model.n_experts, "num_experts_per_tok": model.top_k,
        "output_router_logits": bool(model.balance_coef), "router_aux_loss_coef": model.balance_coef,
    } | ({"shared_intermediate_size": model.n_shared_experts * model.ffn_width} if model.n_shared_experts else {})  # fmt: skip


def _class(model: MoE) -> str:
    return "GraniteMoeShared" if model.n_shared_experts else "GraniteMoe"


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    name = _class(as_granitemoe(transfer.target.model))
    carried(transfer.target, "granitemoe", families=LOADED)
    rows, multipliers = one_std(transfer)
    usage = USAGE.format(
        model=f"{name}ForCausalLM", config=f"{name}Config", start="\ninitialize(model)"
    )
    return written(folder, {
        "config.json": json.dumps(config(transfer, rows, multipliers), indent=2) + "\n",
        "param_groups.json": json.dumps(param_groups(transfer, renamed(rows), [*CANNOT, STARTS, COUNTED]), indent=1) + "\n",
        "loader.py": loader(usage, transfer.target.optimizer.rule),
    })  # fmt: skip
