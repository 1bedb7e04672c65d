"""Hugging Face Granite: the family whose config.json carries every multiplier muP needs.

Granite has one init std, so the plan is rewritten by the one-std shift. Its config cannot hold learning rates by tensor:
those are in `param_groups.json`, and `loader.py` hands them to any torch optimizer. Keys checked against transformers 5.23.0:
`logits_scaling` divides, `attention_multiplier` is the softmax scale itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.records import write_atomically
from scaletune.rules import Planned
from scaletune.transferring import Transfer, one_std
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
from scaletune.zoo import Decoder, Model, Transformer

CANNOT = [f"{GROUPS} or Trainer(optimizers=...)", SCHEDULE, SCRIPT, CLIPPED]
OURS = {
    "norm": "rms",
    "mlp": "swiglu",
    "positions": "rotary",
    "qk_norm": False,
}  # what a Granite is, and a LLaMA
USAGE = """model = transformers.{model}(transformers.{config}.from_json_file("config.json")){start}
optimizer = make_optimizer(model)
scheduler = make_scheduler(optimizer)   # step it once per optimizer step; do not let a launcher step it per process
trainer = transformers.Trainer(model, ..., optimizers=(optimizer, scheduler))"""


def as_llama(model: Model, stack: str = "Granite") -> Transformer:
    """The model, which must be one that Granite's and LLaMA's configs can say; UserError with the first thing that they cannot."""
    if not isinstance(model, Transformer):
        other = ": emit 'granitemoe'" if model.family == "moe" else ""
        raise UserError(
            f"a {stack} config must be of a 'transformer', but got `model.family` {model.family!r}{other}"
        )
    for key, value in OURS.items():
        if getattr(model, key) != value:
            raise UserError(
                f"a {stack} has `model.{key}` {value!r}, but the target has {getattr(model, key)!r}"
            )
    return model


def whole_theta(model: Transformer, stack: str) -> int:
    """`rope_theta` for a stack that keeps it as an integer; UserError where it is none."""
    if not float(model.rope_theta).is_integer():
        raise UserError(
            f"a {stack} has a whole `model.rope_theta`, but the target has {model.rope_theta!r}"
        )
    return int(model.rope_theta)


def shape(transfer: Transfer, model: Decoder) -> dict[str, Any]:
    """The keys that all of them name alike."""
    return {
        "vocab_size": transfer.vocab_size,
        "hidden_size": model.width, "intermediate_size": model.ffn_width, "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads or model.heads, "hidden_act": "silu",
        "max_position_embeddings": transfer.target.data.seq_len, "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": model.biases, "attention_dropout": 0.0, "mlp_bias": model.biases, "tie_word_embeddings": model.tied,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def config(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float], stack: str = "Granite"
) -> dict[str, Any]:
    """config.json of a GraniteForCausalLM; every key is a declared field of GraniteConfig."""
    own = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    return (
        own | shape(transfer, as_llama(transfer.target.model, stack)) | scalars(rows, multipliers)
    )


def scalars(rows: list[Planned], multipliers: dict[str, float]) -> dict[str, float]:
    """The one init std and the four multipliers of every Granite."""
    return {
        "initializer_range": next(
            row.init_std for row in rows if row.name.endswith("v_proj.weight")
        ),
        "embedding_multiplier": multipliers["embedding"],
        "attention_multiplier": multipliers["attention"],
        "residual_multiplier": multipliers["residual"],
        "logits_scaling": 1 / multipliers["logits"],
    }


def written(folder: Path, texts: dict[str, str]) -> list[Path]:
    """Every text under its name in the folder."""
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    as_llama(transfer.target.model)
    carried(transfer.target, "granite", families=LOADED)
    rows, multipliers = one_std(transfer)
    usage = USAGE.format(model="GraniteForCausalLM", config="GraniteConfig", start="")
    return written(folder, {
        "config.json": json.dumps(config(transfer, rows, multipliers), indent=2) + "\n",
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n",
        "loader.py": loader(usage, transfer.target.optimizer.rule),
    })  # fmt: skip
