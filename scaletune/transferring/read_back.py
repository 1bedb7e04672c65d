"""Reads emitted folders back: each tensor's settings, with all multipliers folded into the weights.

In that form all emitted folders of one plan are equal, so a round trip is an equality of
dictionaries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scaletune import counting
from scaletune.errors import UserError
from scaletune.rules import TensorPlan
from scaletune.transferring.fold_multipliers import default_multipliers, fold
from scaletune.transferring.formats.granitemoe import hf_name
from scaletune.transferring.target import Transfer
from scaletune.zoo import Model, MoEConfig, TransformerConfig

SETTINGS = ("init_std", "lr", "weight_decay", "eps")
Settings = dict[str, dict[str, float]]
OWN_TENSORS = "its architecture has other tensors than the target's transformer"
UNREAD = {
    "minicpm3": OWN_TENSORS,
    "falcon_h1": OWN_TENSORS,
    "nanogpt_mup": (
        "its file has base values and the ratios of width and depth; nanoGPT-mup computes the plan"
    ),
}
"""Format -> why `read` cannot recover the plan from its folder."""


def settings(rows: list[TensorPlan], logits_multiplier: float = 1.0) -> Settings:
    """Tensor name -> init std, lr, weight decay and eps; `logits`: the multiplier that remains."""
    own = {row.name: {key: asdict(row)[key] for key in SETTINGS} for row in rows}
    return own | {"logits": {"multiplier": logits_multiplier}}


def plan_settings(transfer: Transfer) -> Settings:
    """The plan itself, in the form that `read` returns."""
    return settings(*fold(transfer.plan, transfer.multipliers, transfer.target.model))


def _model(config: dict[str, Any]) -> TransformerConfig | MoEConfig:
    """The model shape in a Granite-like config.json."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    common = {
        "width": width,
        "depth": config["num_hidden_layers"],
        "head_dim": width // heads,
        "ffn_ratio": config["intermediate_size"] / width,
        "kv_heads": config["num_key_value_heads"],
        "biases": config["attention_bias"],
        "tied": config["tie_word_embeddings"],
    }
    if "num_local_experts" not in config:
        return TransformerConfig(**common)
    shared = config.get("shared_intermediate_size", 0) // config["intermediate_size"]
    return MoEConfig(
        **common,
        n_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        n_shared_experts=shared,
    )


def _multipliers(config: dict[str, Any], head_dim: int) -> dict[str, float]:
    """Forward multipliers; Granite's `logits_scaling` divides, HyperCLOVA-X's multiplies."""
    scaling = config.get("logits_scaling", 1.0)
    return {
        "embedding": config.get("embedding_multiplier", 1.0),
        "attention": config.get("attention_multiplier", head_dim**-0.5),
        "residual": config.get("residual_multiplier", 1.0),
        "logits": scaling if config["model_type"] == "hyperclovax" else 1 / scaling,
    }


def _row(name: str, role: Any, groups: list[dict[str, Any]]) -> TensorPlan:
    """The settings of the first group whose pattern matches, as in loader.py."""
    for group in groups:
        if any(re.match(pattern, name) for pattern in group["patterns"]):
            own = {key: group[key] for key in SETTINGS} | {"family": group.get("family", "adamw")}
            return TensorPlan(name, role, 1.0, 1.0, multiplier=1.0, **own)
    raise UserError(
        f"param_groups.json must have a pattern for every parameter, but none matches {name!r}"
    )


def read(folder: str | Path, model: Model | None = None) -> Settings:
    """Reads the settings of an emitted folder.

    Args:
        folder: A folder with a plan.json (format `recipe`) or a param_groups.json.
        model: The model's shape, for a folder without config.json.

    Raises:
        UserError: The folder has neither file, its format cannot be read back (`UNREAD`), or its
            patterns miss a parameter.
    """
    folder = Path(folder)
    if (folder / "plan.json").exists():
        return _read_plan(json.loads((folder / "plan.json").read_text()))
    if not (folder / "param_groups.json").exists():
        raise UserError(
            "a folder to read back must have a plan.json or a param_groups.json,"
            f" but `{folder}` has neither"
        )
    content = json.loads((folder / "param_groups.json").read_text())
    groups = content["groups"]
    stack_name: Callable[[str], str] = str
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        if reason := UNREAD.get(config["model_type"]):
            raise UserError(f"a {config['model_type']} config cannot be read back: {reason}")
        model, vocab_size = _model(config), config["vocab_size"]
        stack_name = hf_name if isinstance(model, MoEConfig) else stack_name
        multipliers = _multipliers(config, model.head_dim)
    elif isinstance(model, TransformerConfig | MoEConfig):
        vocab_size = 1
        multipliers = content.get("multipliers") or default_multipliers(model.head_dim)
    else:
        raise UserError(f"`{folder}` has no config.json with the model's shape: pass `model`")
    rows = [
        replace(_row(stack_name(t.name), t.role, groups), name=t.name)
        for t in counting.tensors(model, vocab_size)
    ]
    return settings(*fold(rows, multipliers, model))


def _read_plan(plan: dict[str, Any]) -> Settings:
    """Settings from the plan.json of format `recipe`."""
    target, rows = plan["target"], [TensorPlan(**row) for row in plan["tensors"]]
    family = MoEConfig if target["family"] == "moe" else TransformerConfig
    model = family(**{key: target[key] for key in family.model_fields if key in target})
    return settings(*fold(rows, plan["multipliers"], model))
