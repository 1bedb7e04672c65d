"""Writes param_groups.json and loader.py for plain PyTorch and Hugging Face Accelerate.

They fit any module with the parameter names of Hugging Face's LLaMA.
"""

from __future__ import annotations

import json
from pathlib import Path

from scaletune.transferring.fold_multipliers import EXACT, fold_all
from scaletune.transferring.formats.granite import write_files
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import (
    CLIPPED,
    LOADED,
    SCRIPT,
    param_groups,
    require_supported,
)
from scaletune.transferring.target import Transfer

NAMES = (
    "parameter names other than model.layers.0.self_attn.q_proj.weight and so on: change the"
    " patterns in param_groups.json"
)
SHAPES = (
    "the model: build it yourself, with a softmax scale of head_dim**-0.5 and no other forward"
    " multiplier"
)
CANNOT = [NAMES, SHAPES, f"forward multipliers: {EXACT}", SCRIPT, CLIPPED]
USAGE = """initialize(model)                       # before it is wrapped, sharded or compiled
optimizer = make_optimizer(model)
scheduler = make_scheduler(optimizer)   # step it once per optimizer step

With Accelerate, create both first, and do not prepare the scheduler: Accelerate would step it once
per process.
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)"""


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes param_groups.json and loader.py."""
    rows = fold_all(transfer, "pytorch")
    require_supported(transfer.target, "pytorch", families=LOADED)
    groups = param_groups(transfer, rows, CANNOT)
    texts = {
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(USAGE, transfer.target.optimizer.rule),
    }
    return write_files(folder, texts)
