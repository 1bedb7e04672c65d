"""Writes a training recipe (YAML) for fairseq2 0.8.1, and a module that draws initial weights.

The AdamW of fairseq2 takes groups by patterns of parameter names. A tensor goes into the first
group with a pattern that `re.match`es its name; patterns start with `.*` because a wrapper may
prefix the name. The config has one `init_std`, so `initialize` draws the matrices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolve_schedule
from scaletune.rules import TensorPlan
from scaletune.transferring.fold_multipliers import EXACT, fold_all
from scaletune.transferring.formats.granite import require_llama, write_files
from scaletune.transferring.param_groups import (
    CLIPPED,
    HALF_STEP,
    named_groups,
    param_groups,
    require_supported,
    stds,
)
from scaletune.transferring.target import Transfer

NAMES = {
    "model.embed_tokens.weight": r".*decoder_frontend\.embed\.weight$",
    "lm_head.weight": r".*final_proj\.weight$",
    "model.norm.weight": r".*decoder\.layer_norm\.weight$",
    "input_layernorm.weight": r".*self_attn_layer_norm\.weight$",
    "post_attention_layernorm.weight": r".*ffn_layer_norm\.weight$",
    "self_attn.q_proj.weight": r".*self_attn\.q_proj\.weight$",
    "self_attn.k_proj.weight": r".*self_attn\.k_proj\.weight$",
    "self_attn.v_proj.weight": r".*self_attn\.v_proj\.weight$",
    "self_attn.o_proj.weight": r".*self_attn\.output_proj\.weight$",
    "mlp.gate_proj.weight": r".*ffn\.gate_proj\.weight$",
    "mlp.up_proj.weight": r".*ffn\.inner_proj\.weight$",
    "mlp.down_proj.weight": r".*ffn\.output_proj\.weight$",
}
NORM_EPS = 1e-5
"""eps of fairseq2's RMSNorm; LLaMAConfig has no key for it."""

CANNOT = [
    "init std per tensor: the config has one for all matrices, truncated at three standard"
    " deviations; scaletune_fairseq2.py draws the weights in `setup_model`",
    f"forward multipliers: {EXACT}",
    CLIPPED,
    "batch size in tokens: set it in the dataset's config to the value in param_groups.json",
    HALF_STEP,
]

MODULE = '''\
"""Initial weights for fairseq2 0.8.1, written by scaletune. The groups are in fairseq2.yaml.

    class MyRecipe(TrainRecipe):
        def setup_model(self, context, model, newly_initialized):
            return initialize(model) if newly_initialized else model
"""

import re

import torch

STD = {std}


@torch.no_grad()
def initialize(model, seed=0):
    """Draws each matrix with its own std.

    fairseq2 builds the model on the meta device on all ranks but the first; nothing is drawn there.
    """
    generator, unused = torch.Generator().manual_seed(seed), set(STD)
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in STD if re.match(pattern, name)), None)
        unused.discard(pattern)
        if pattern is not None and not parameter.is_meta:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD[pattern])
    if unused:
        raise ValueError(f"every pattern must match a parameter, but not these: {{sorted(unused)}}")
    return model
'''


def schedule(target: Recipe, peaks: list[float]) -> dict[str, Any]:
    """`lr_scheduler`: cosine ends at a share of each peak, polynomial at an lr per group."""
    s = resolve_schedule(target.schedule, target.budget)
    warmup = {"num_warmup_steps": round(s.warmup * target.budget.steps)}
    if s.kind == "cosine":
        return {"name": "cosine_annealing", "config": warmup | {"final_lr_scale": s.floor}}
    share = 1.0 if s.kind == "constant" else s.floor
    final = [share * peak for peak in peaks]
    return {"name": "polynomial_decay", "config": warmup | {"power": 1.0, "final_lr": final}}


def config(transfer: Transfer, rows: list[TensorPlan]) -> dict[str, Any]:
    """The sections model, optimizer, lr_scheduler, trainer and regime of a training recipe."""
    model, t = require_llama(transfer.target.model, "fairseq2 LLaMA"), transfer.target
    if model.norm_eps != NORM_EPS:
        raise UserError(
            f"fairseq2 LLaMA needs `model.norm_eps` {NORM_EPS:g},"
            f" but the target has {model.norm_eps:g}"
        )
    groups = [{"params": group.pop("patterns"), **group} for group in named_groups(rows, NAMES)]
    o = t.optimizer
    overrides = {
        "model_dim": model.width,
        "max_seq_len": t.data.seq_len,
        "vocab_size": transfer.vocab_size,
        "pad_idx": None,
        "tied_embeddings": model.tied,
        "num_layers": model.depth,
        "num_attn_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "ffn_inner_dim": model.ffn_width,
        "ffn_inner_dim_scale": 1.0,
        "ffn_inner_dim_multiplier": 1.0,
        "ffn_inner_dim_multiple_of": 1,
        "rope_theta": model.rope_theta,
        "use_scaled_rope": False,
        "dropout_p": 0.0,
        "init_std_scale": "none",
        "init_std": next(row.init_std for row in rows if row.name.endswith("v_proj.weight")),
    }
    adamw = {
        "lr": o.lr,
        "betas": [o.beta1, o.beta2],
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "groups": groups,
    }
    return {
        "model": {"family": "llama", "arch": "7b", "config_overrides": overrides},
        "optimizer": {"name": "adamw", "config": adamw},
        "lr_scheduler": schedule(t, [group["lr"] for group in groups]),
        "trainer": {"max_grad_norm": o.clip},
        "regime": {"num_steps": t.budget.steps},
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes fairseq2.yaml, scaletune_fairseq2.py, and param_groups.json with the evidence."""
    require_llama(transfer.target.model, "fairseq2 LLaMA")
    require_supported(transfer.target, "fairseq2", kinds=("constant", "linear", "cosine"))
    rows = fold_all(transfer, "fairseq2")
    groups = param_groups(transfer, rows, CANNOT)
    texts = {
        "fairseq2.yaml": yaml.safe_dump(config(transfer, rows), sort_keys=False, width=200),
        "scaletune_fairseq2.py": MODULE.format(std=stds(rows, NAMES)),
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
    }
    return write_files(folder, texts)
