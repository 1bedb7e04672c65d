"""Hugging Face LLaMA: a config without multipliers, so the plan is folded into the weights; `loader.py` draws and trains them so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.rules import Planned
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, without_multipliers
from scaletune.transferring.formats.granite import USAGE, as_llama, shape, written
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import (
    CLIPPED,
    GROUPS,
    LOADED,
    SCHEDULE,
    SCRIPT,
    carried,
    param_groups,
)

STARTS = "init std of each tensor: initialize(model) of loader.py draws them; `initializer_range` is that of most hidden matrices alone"
CANNOT = [
    f"{GROUPS} or Trainer(optimizers=...)",
    STARTS,
    f"forward multipliers: {EXACT}",
    SCHEDULE,
    SCRIPT,
    CLIPPED,
]


def config(transfer: Transfer, rows: list[Planned]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM; every key is a declared field of LlamaConfig."""
    std = next(row.init_std for row in rows if row.name.endswith("v_proj.weight"))
    return (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        | shape(transfer, as_llama(transfer.target.model, "LLaMA"))
        | {"initializer_range": std}
    )


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    rows = without_multipliers(transfer, "llama")
    content = config(transfer, rows)
    carried(transfer.target, "llama", families=LOADED)
    usage = USAGE.format(
        model="LlamaForCausalLM", config="LlamaConfig", start="\ninitialize(model)"
    )
    return written(folder, {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n",
        "loader.py": loader(usage, transfer.target.optimizer.rule),
    })  # fmt: skip
