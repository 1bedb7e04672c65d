"""DeepSpeed's JSON beside plain PyTorch's groups: it has settings for all tensors at once, so optimizer and scheduler stay ours.

Read at 38327e07 (0.16.5): a scalar `WarmupLR` writes one lr into every group, and ZeRO-3 shards lose what `MuAdamW` reads off them; neither
is emitted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, without_multipliers
from scaletune.transferring.formats.granite import written
from scaletune.transferring.formats.pytorch import NAMES, SHAPES
from scaletune.transferring.loader import loader
from scaletune.transferring.param_groups import CLIPPED, carried, param_groups

CANNOT = [
    "learning rate, weight decay and eps of each tensor: param_groups.json, through loader.py, before `initialize` shards the model",
    "schedule: loader.py's LambdaLR given as `lr_scheduler`; of its own, a scalar WarmupLR would write one lr into every group",
    "token horizon: set it in the training script as param_groups.json says", NAMES, SHAPES, f"forward multipliers: {EXACT}", CLIPPED,
]  # fmt: skip
USAGE = """initialize(model)                       # before deepspeed.initialize, which shards it
optimizer = make_optimizer(model)
engine, optimizer, _, _ = deepspeed.initialize(
    model=model, optimizer=optimizer, lr_scheduler=make_scheduler(optimizer), config="deepspeed.json"
)"""


def config(transfer: Transfer) -> dict[str, Any]:
    """Batch in sequences, clipping, and leave to bring one's own optimizer under ZeRO."""
    t = transfer.target
    return {
        "train_batch_size": t.budget.batch_tokens // t.data.seq_len,
        "gradient_clipping": t.optimizer.clip,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`deepspeed.json`, `param_groups.json`, `loader.py`."""
    rows = without_multipliers(transfer, "deepspeed")
    carried(transfer.target, "deepspeed")
    return written(folder, {
        "deepspeed.json": json.dumps(config(transfer), indent=2) + "\n",
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n",
        "loader.py": loader(USAGE),
    })  # fmt: skip
