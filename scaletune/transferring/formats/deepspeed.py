"""Writes deepspeed.json, param_groups.json and loader.py for DeepSpeed.

DeepSpeed's JSON has one setting for all tensors, so loader.py builds the optimizer and the
scheduler. Checked at 38327e07 (0.16.5): a scalar `WarmupLR` writes one lr into every group, and
ZeRO-3 shards lose the width ratios that `MuAdamW` reads from the parameters. Neither is emitted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.transferring.fold_multipliers import EXACT, fold_all
from scaletune.transferring.formats.granite import write_files
from scaletune.transferring.formats.pytorch import NAMES, SHAPES
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import CLIPPED, GROUPS, param_groups, require_supported
from scaletune.transferring.target import Transfer

CANNOT = [
    f"{GROUPS}; call it before `deepspeed.initialize`, which shards the model",
    "learning-rate schedule: pass loader.py's LambdaLR as `lr_scheduler`; DeepSpeed's scalar"
    " WarmupLR would write one lr into every group",
    "token horizon: set it in the training script to the value in param_groups.json",
    NAMES,
    SHAPES,
    f"forward multipliers: {EXACT}",
    CLIPPED,
]
USAGE = """initialize(model)                       # before deepspeed.initialize, which shards it
optimizer = make_optimizer(model)
engine, optimizer, _, _ = deepspeed.initialize(
    model=model,
    optimizer=optimizer,
    lr_scheduler=make_scheduler(optimizer),
    config="deepspeed.json",
)"""


def config(transfer: Transfer) -> dict[str, Any]:
    """deepspeed.json: batch size in sequences, clipping, and ZeRO with a client optimizer."""
    t = transfer.target
    return {
        "train_batch_size": t.budget.batch_tokens // t.data.seq_len,
        "gradient_clipping": t.optimizer.clip,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes deepspeed.json, param_groups.json and loader.py."""
    rows = fold_all(transfer, "deepspeed")
    require_supported(transfer.target, "deepspeed")
    groups = param_groups(transfer, rows, CANNOT)
    texts = {
        "deepspeed.json": json.dumps(config(transfer), indent=2) + "\n",
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(USAGE),
    }
    return write_files(folder, texts)
