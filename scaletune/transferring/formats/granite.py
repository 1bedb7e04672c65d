"""Writes a Granite config.json (Hugging Face transformers), param_groups.json and loader.py.

Granite's config.json has a key for every multiplier that muP needs. It has one init std, so the
plan is rewritten with `target.one_std`. It cannot hold a learning rate per tensor: loader.py sets
those from param_groups.json for any torch optimizer. Keys checked against transformers 5.23.0:
`logits_scaling` divides, `attention_multiplier` is the softmax scale itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.records import write_atomically
from scaletune.rules import TensorPlan
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
from scaletune.transferring.target import Transfer, one_std
from scaletune.zoo import DecoderConfig, Model, TransformerConfig

TRAINER = "; for a Trainer, pass optimizer and scheduler as Trainer(optimizers=...)"
CANNOT = [GROUPS + TRAINER, SCHEDULE, SCRIPT, CLIPPED]
REQUIRED = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "qk_norm": False}
"""The architecture of a Granite and of a LLaMA, as recipe settings."""

USAGE = """model = transformers.{model}(transformers.{config}.from_json_file("config.json")){start}
optimizer = make_optimizer(model)
scheduler = make_scheduler(optimizer)   # step it once per optimizer step, not once per process
trainer = transformers.Trainer(model, ..., optimizers=(optimizer, scheduler))"""


def require_llama(model: Model, stack: str = "Granite") -> TransformerConfig:
    """Returns the model if its architecture is that of a Granite or LLaMA; otherwise UserError."""
    if not isinstance(model, TransformerConfig):
        other = ": emit 'granitemoe'" if model.family == "moe" else ""
        raise UserError(
            f"{stack} needs `model.family` 'transformer', but got {model.family!r}{other}"
        )
    for key, value in REQUIRED.items():
        if getattr(model, key) != value:
            raise UserError(
                f"{stack} needs `model.{key}` {value!r}, but the target has {getattr(model, key)!r}"
            )
    return model


def integer_rope_theta(model: TransformerConfig, stack: str) -> int:
    """`rope_theta`, for a stack whose config has an integer."""
    if not float(model.rope_theta).is_integer():
        raise UserError(
            f"{stack} needs an integer `model.rope_theta`, but the target has {model.rope_theta!r}"
        )
    return int(model.rope_theta)


def shape(transfer: Transfer, model: DecoderConfig) -> dict[str, Any]:
    """Config keys with the same name in all LLaMA-like models of transformers."""
    return {
        "vocab_size": transfer.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "hidden_act": "silu",
        "max_position_embeddings": transfer.target.data.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": model.biases,
        "attention_dropout": 0.0,
        "mlp_bias": model.biases,
        "tie_word_embeddings": model.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def config(
    transfer: Transfer,
    rows: list[TensorPlan],
    multipliers: dict[str, float],
    stack: str = "Granite",
) -> dict[str, Any]:
    """config.json of a GraniteForCausalLM; every key is a declared field of GraniteConfig."""
    own = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    model = require_llama(transfer.target.model, stack)
    return own | shape(transfer, model) | scalars(rows, multipliers)


def scalars(rows: list[TensorPlan], multipliers: dict[str, float]) -> dict[str, float]:
    """The one init std and the four multipliers of a Granite."""
    std = next(row.init_std for row in rows if row.name.endswith("v_proj.weight"))
    return {
        "initializer_range": std,
        "embedding_multiplier": multipliers["embedding"],
        "attention_multiplier": multipliers["attention"],
        "residual_multiplier": multipliers["residual"],
        "logits_scaling": 1 / multipliers["logits"],
    }


def write_files(folder: Path, texts: dict[str, str]) -> list[Path]:
    """Writes each text to the file of its name in `folder`."""
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes config.json, param_groups.json and loader.py."""
    require_llama(transfer.target.model)
    require_supported(transfer.target, "granite", families=LOADED)
    rows, multipliers = one_std(transfer)
    content = config(transfer, rows, multipliers)
    groups = param_groups(transfer, rows, CANNOT)
    usage = USAGE.format(model="GraniteForCausalLM", config="GraniteConfig", start="")
    texts = {
        "config.json": json.dumps(content, indent=2) + "\n",
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
        "loader.py": loader(usage, transfer.target.optimizer.rule),
    }
    return write_files(folder, texts)
