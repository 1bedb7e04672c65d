"""What was emitted, read back: each tensor's settings with every multiplier of the config written into the weights.

In that form all emitted folders of one plan say the same, so a round trip is an equality of dictionaries.
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
from scaletune.rules import Planned
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import folded, neutral
from scaletune.transferring.formats.granitemoe import name_in
from scaletune.zoo import Model, MoE, Transformer

SETTINGS = ("init_std", "lr", "weight_decay", "eps")
Settings = dict[str, dict[str, float]]
OWN_TENSORS = "its tensors are its own, not those of the target's transformer"
UNREAD = {  # format -> why its folder does not tell the plan, one setting a tensor
    "minicpm3": OWN_TENSORS, "falcon_h1": OWN_TENSORS,
    "nanogpt_mup": "its file has the base values and the ratios of width and depth, of which its own code makes the plan",
}  # fmt: skip


def settings(rows: list[Planned], left: float = 1.0) -> Settings:
    """Tensor name -> init std, lr, weight decay and eps; what still multiplies the logits under `logits`."""
    return {row.name: {key: asdict(row)[key] for key in SETTINGS} for row in rows} | {
        "logits": {"multiplier": left}
    }


def plain(transfer: Transfer) -> Settings:
    """The plan itself in the form that `read` answers in."""
    return settings(*folded(transfer.plan, transfer.multipliers, transfer.target.model))


def _model(config: dict[str, Any]) -> Transformer | MoE:
    """The shape that a Granite-like config.json tells."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    common = {
        "width": width, "depth": config["num_hidden_layers"], "head_dim": width // heads, "ffn_ratio": config["intermediate_size"] / width,
        "kv_heads": config["num_key_value_heads"], "biases": config["attention_bias"], "tied": config["tie_word_embeddings"],
    }  # fmt: skip
    if "num_local_experts" not in config:
        return Transformer(**common)
    shared = config.get("shared_intermediate_size", 0) // config["intermediate_size"]
    return MoE(
        **common,
        n_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        n_shared_experts=shared,
    )


def _multipliers(config: dict[str, Any], head_dim: int) -> dict[str, float]:
    """Forward multipliers by our names; Granite's `logits_scaling` divides, HyperCLOVA-X's multiplies."""
    scaling = config.get("logits_scaling", 1.0)
    return {
        "embedding": config.get("embedding_multiplier", 1.0),
        "attention": config.get("attention_multiplier", head_dim**-0.5),
        "residual": config.get("residual_multiplier", 1.0),
        "logits": scaling if config["model_type"] == "hyperclovax" else 1 / scaling,
    }


def _row(name: str, role: Any, groups: list[dict[str, Any]]) -> Planned:
    """The group whose pattern matches first, as `loader.py` would choose it."""
    for group in groups:
        if any(re.match(pattern, name) for pattern in group["patterns"]):
            own = {key: group[key] for key in SETTINGS} | {"family": group.get("family", "adamw")}
            return Planned(name, role, 1.0, 1.0, multiplier=1.0, **own)
    raise UserError(
        f"param_groups.json must explain every parameter, but has no pattern for {name!r}"
    )


def read(folder: str | Path, model: Model | None = None) -> Settings:
    """Settings of an emitted folder: of `recipe` from plan.json; else from param_groups.json, and config.json or `model` for the shape."""
    folder = Path(folder)
    if (folder / "plan.json").exists():
        return _of_plan(json.loads((folder / "plan.json").read_text()))
    if not (folder / "param_groups.json").exists():
        raise UserError(
            f"a folder to read back must have a plan.json or a param_groups.json, but `{folder}` has neither"
        )
    said = json.loads((folder / "param_groups.json").read_text())
    groups = said["groups"]
    theirs: Callable[[str], str] = str
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        if reason := UNREAD.get(config["model_type"]):
            raise UserError(f"a {config['model_type']} cannot be read back as the plan: {reason}")
        model, vocab_size = _model(config), config["vocab_size"]
        theirs = name_in if isinstance(model, MoE) else theirs
        multipliers = _multipliers(config, model.head_dim)
    elif isinstance(model, Transformer | MoE):
        vocab_size, multipliers = 1, said.get("multipliers") or neutral(model.head_dim)
    else:
        raise UserError(f"`{folder}` has no config.json that tells the model's shape: give `model`")
    rows = [
        replace(_row(theirs(t.name), t.role, groups), name=t.name)
        for t in counting.tensors(model, vocab_size)
    ]
    return settings(*folded(rows, multipliers, model))


def _of_plan(plan: dict[str, Any]) -> Settings:
    """From the neutral plan of `recipe`."""
    family: type[Transformer | MoE] = MoE if plan["target"]["family"] == "moe" else Transformer
    model = family(
        **{key: plan["target"][key] for key in family.model_fields if key in plan["target"]}
    )
    return settings(
        *folded([Planned(**row) for row in plan["tensors"]], plan["multipliers"], model)
    )
