"""Writes a GraniteMoe(Shared) config.json (Hugging Face transformers), for family `moe`.

GraniteMoeShared is the class with shared experts, which process every token. The config has
Granite's keys and one init std. It has no key for a router multiplier: if the router is a readout,
its multiplier is folded into its weights and loader.py draws them. Checked in transformers 5.23.0:
the softmax runs over the chosen experts alone, which is `norm_top_k`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.rules import TensorPlan
from scaletune.transferring.formats.granite import CANNOT, USAGE, scalars, shape, write_files
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import LOADED, param_groups, require_supported
from scaletune.transferring.target import Transfer, one_std
from scaletune.zoo import Model, MoEConfig

REQUIRED = {"norm": "rms", "positions": "rotary", "qk_norm": False, "norm_top_k": True}
NAMES = {
    "mlp.gate.weight": "block_sparse_moe.router.weight",
    "mlp.experts.gate_proj.weight": "block_sparse_moe.experts.gate_up_proj",
    "mlp.experts.up_proj.weight": "block_sparse_moe.experts.gate_up_proj",
    "mlp.experts.down_proj.weight": "block_sparse_moe.experts.down_proj",
    "mlp.shared_experts.gate_proj.weight": "shared_mlp.input_linear.weight",
    "mlp.shared_experts.up_proj.weight": "shared_mlp.input_linear.weight",
    "mlp.shared_experts.down_proj.weight": "shared_mlp.output_linear.weight",
}
"""End of our tensor name -> end of transformers' name, which keeps gate and up in one tensor."""

ROUTER_INIT = (
    "init std of the router: initialize(model) of loader.py draws it; `initializer_range` is the"
    " std of all other matrices"
)
BALANCE_LOSS = (
    "the loss that transformers reports includes the load-balancing loss; the losses of scaletune"
    " and of the proxies are nats per token without it"
)


def require_moe(model: Model) -> MoEConfig:
    """Returns the model if its architecture is that of a GraniteMoe; otherwise UserError."""
    if not isinstance(model, MoEConfig):
        raise UserError(f"GraniteMoe needs `model.family` 'moe', but got {model.family!r}")
    for key, value in REQUIRED.items():
        if getattr(model, key) != value:
            raise UserError(
                f"GraniteMoe needs `model.{key}` {value!r},"
                f" but the target has {getattr(model, key)!r}"
            )
    return model


def hf_name(name: str) -> str:
    """Our tensor name -> the name in transformers."""
    block, _, end = name.rpartition("mlp.")
    return block + NAMES[f"mlp.{end}"] if f"mlp.{end}" in NAMES else name


def rename_rows(rows: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Rows of transformers' tensors; both halves of a packed tensor have the same plan."""
    return list({hf_name(row.name): replace(row, name=hf_name(row.name)) for row in rows}.values())


def config(
    transfer: Transfer, rows: list[TensorPlan], multipliers: dict[str, float]
) -> dict[str, Any]:
    """config.json of a GraniteMoe(Shared)ForCausalLM; every key is a declared config field."""
    model = require_moe(transfer.target.model)
    kind = {"architectures": [f"{_class(model)}ForCausalLM"], "model_type": _class(model).lower()}
    common = {key: value for key, value in shape(transfer, model).items() if key != "mlp_bias"}
    experts = {
        "num_local_experts": model.n_experts,
        "num_experts_per_tok": model.top_k,
        "output_router_logits": bool(model.balance_coef),
        "router_aux_loss_coef": model.balance_coef,
    }
    if model.n_shared_experts:
        experts["shared_intermediate_size"] = model.n_shared_experts * model.ffn_width
    return kind | common | scalars(rows, multipliers) | experts


def _class(model: MoEConfig) -> str:
    return "GraniteMoeShared" if model.n_shared_experts else "GraniteMoe"


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes config.json, param_groups.json and loader.py."""
    name = _class(require_moe(transfer.target.model))
    require_supported(transfer.target, "granitemoe", families=LOADED)
    rows, multipliers = one_std(transfer)
    content = config(transfer, rows, multipliers)
    groups = param_groups(transfer, rename_rows(rows), [*CANNOT, ROUTER_INIT, BALANCE_LOSS])
    start = "\ninitialize(model)"
    usage = USAGE.format(model=f"{name}ForCausalLM", config=f"{name}Config", start=start)
    texts = {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(usage, transfer.target.optimizer.rule),
    }
    return write_files(folder, texts)
