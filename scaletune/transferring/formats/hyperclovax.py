"""Hugging Face HyperCLOVA-X: Granite's keys, but for `logits_scaling`, which multiplies here (transformers 5.23.0)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.rules import Planned
from scaletune.transferring import Transfer, one_std
from scaletune.transferring.formats.granite import CANNOT, USAGE, written
from scaletune.transferring.formats.granite import config as granite_config
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import LOADED, carried, param_groups


def config(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """config.json of a HyperCLOVAXForCausalLM; every key is a declared field of HyperCLOVAXConfig."""
    own = {
        "architectures": ["HyperCLOVAXForCausalLM"],
        "model_type": "hyperclovax",
        "use_post_norm": False,
    }
    return (
        granite_config(transfer, rows, multipliers, "HyperCLOVA-X")
        | own
        | {"logits_scaling": multipliers["logits"]}
    )


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    rows, multipliers = one_std(transfer)
    content = config(transfer, rows, multipliers)
    carried(transfer.target, "hyperclovax", families=LOADED)
    return written(folder, {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n",
        "loader.py": loader(USAGE.format(model="HyperCLOVAXForCausalLM", config="HyperCLOVAXConfig", start=""), transfer.target.optimizer.rule),
    })  # fmt: skip
