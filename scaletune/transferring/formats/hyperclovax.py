"""Writes a HyperCLOVA-X config.json (Hugging Face transformers), param_groups.json and loader.py.

The keys are Granite's, except that `logits_scaling` multiplies the logits (transformers 5.23.0).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.rules import TensorPlan
from scaletune.transferring.formats.granite import CANNOT, USAGE, write_files
from scaletune.transferring.formats.granite import config as granite_config
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import LOADED, param_groups, require_supported
from scaletune.transferring.target import Transfer, one_std


def config(
    transfer: Transfer, rows: list[TensorPlan], multipliers: dict[str, float]
) -> dict[str, Any]:
    """config.json of a HyperCLOVAXForCausalLM; every key is a declared config field."""
    own = {
        "architectures": ["HyperCLOVAXForCausalLM"],
        "model_type": "hyperclovax",
        "use_post_norm": False,
        "logits_scaling": multipliers["logits"],
    }
    return granite_config(transfer, rows, multipliers, "HyperCLOVA-X") | own


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes config.json, param_groups.json and loader.py."""
    rows, multipliers = one_std(transfer)
    content = config(transfer, rows, multipliers)
    require_supported(transfer.target, "hyperclovax", families=LOADED)
    groups = param_groups(transfer, rows, CANNOT)
    usage = USAGE.format(model="HyperCLOVAXForCausalLM", config="HyperCLOVAXConfig", start="")
    texts = {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(usage, transfer.target.optimizer.rule),
    }
    return write_files(folder, texts)
