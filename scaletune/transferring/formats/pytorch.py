"""Plain PyTorch, and Accelerate: groups by name and a loader, for any module that names its parameters as Hugging Face's LLaMA does."""

from __future__ import annotations

import json
from pathlib import Path

from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, without_multipliers
from scaletune.transferring.formats.granite import written
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import CLIPPED, LOADED, SCRIPT, carried, param_groups

NAMES = "other parameter names than model.layers.0.self_attn.q_proj.weight and the like: change the patterns of param_groups.json"
SHAPES = "the model's shape: it is yours to build, with a softmax scale of head_dim**-0.5 and no other forward multiplier"
CANNOT = [NAMES, SHAPES, f"forward multipliers: {EXACT}", SCRIPT, CLIPPED]
USAGE = """initialize(model)                       # before it is wrapped, sharded or compiled
optimizer = make_optimizer(model)
scheduler = make_scheduler(optimizer)   # step it once per optimizer step

With Accelerate, make both first and leave the scheduler out, which it would step once per process:
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)"""


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`param_groups.json`, `loader.py`."""
    rows = without_multipliers(transfer, "pytorch")
    carried(transfer.target, "pytorch", families=LOADED)
    return written(
        folder,
        {
            "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n",
            "loader.py": loader(USAGE, transfer.target.optimizer.rule),
        },
    )
