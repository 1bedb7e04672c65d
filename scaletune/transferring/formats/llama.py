"""Writes a LLaMA config.json (Hugging Face transformers), param_groups.json and loader.py.

The config has no multipliers, so they are folded into the weights. loader.py draws each matrix with
its own init std.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.rules import TensorPlan
from scaletune.transferring.fold_multipliers import EXACT, fold_all
from scaletune.transferring.formats.granite import (
    TRAINER,
    USAGE,
    require_llama,
    shape,
    write_files,
)
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import (
    CLIPPED,
    GROUPS,
    LOADED,
    SCHEDULE,
    SCRIPT,
    param_groups,
    require_supported,
)
from scaletune.transferring.target import Transfer

INIT_STDS = (
    "init std per tensor: initialize(model) of loader.py draws the weights; `initializer_range` is"
    " the std of most hidden matrices only"
)
CANNOT = [
    GROUPS + TRAINER,
    INIT_STDS,
    f"forward multipliers: {EXACT}",
    SCHEDULE,
    SCRIPT,
    CLIPPED,
]


def config(transfer: Transfer, rows: list[TensorPlan]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM; every key is a declared field of LlamaConfig."""
    std = next(row.init_std for row in rows if row.name.endswith("v_proj.weight"))
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    model = require_llama(transfer.target.model, "LLaMA")
    return own | shape(transfer, model) | {"initializer_range": std}


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes config.json, param_groups.json and loader.py."""
    rows = fold_all(transfer, "llama")
    content = config(transfer, rows)
    require_supported(transfer.target, "llama", families=LOADED)
    groups = param_groups(transfer, rows, CANNOT)
    start = "\ninitialize(model)"
    usage = USAGE.format(model="LlamaForCausalLM", config="LlamaConfig", start=start)
    texts = {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(usage, transfer.target.optimizer.rule),
    }
    return write_files(folder, texts)
