"""fairseq2 0.8.1: a recipe's YAML, whose AdamW takes groups by patterns of names; `initialize` draws what its one `init_std` cannot.

The first group with a pattern that `re.match`es takes the tensor; patterns start at `.*`, for a wrapper may stand before the name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolved
from scaletune.rules import Planned
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, without_multipliers
from scaletune.transferring.formats.granite import as_llama, written
from scaletune.transferring.param_groups import CLIPPED, carried, named_groups, param_groups, stds

NAMES = {
    "model.embed_tokens.weight": r".*decoder_frontend\.embed\.weight$", "lm_head.weight": r".*final_proj\.weight$",
    "model.norm.weight": r".*decoder\.layer_norm\.weight$", "input_layernorm.weight": r".*self_attn_layer_norm\.weight$",
    "post_attention_layernorm.weight": r".*ffn_layer_norm\.weight$", "self_attn.q_proj.weight": r".*self_attn\.q_proj\.weight$",
    "self_attn.k_proj.weight": r".*self_attn\.k_proj\.weight$", "self_attn.v_proj.weight": r".*self_attn\.v_proj\.weight$",
    "self_attn.o_proj.weight": r".*self_attn\.output_proj\.weight$", "mlp.gate_proj.weight": r".*ffn\.gate_proj\.weight$",
    "mlp.up_proj.weight": r".*ffn\.inner_proj\.weight$", "mlp.down_proj.weight": r".*ffn\.output_proj\.weight$",
}  # fmt: skip
NORM_EPS = 1e-5  # of its RMSNorm, which LLaMAConfig does not set
CANNOT = [
    "init std of each tensor: its config has one for all matrices, cut at three of it; scaletune_fairseq2.py draws them in `setup_model`",
    f"forward multipliers: {EXACT}", CLIPPED,
    "batch size in tokens: it is the dataset's, so set it there as param_groups.json says",
    "half a step: warmup counts whole steps, where the plan's schedule is read in the middle of each",
]  # fmt: skip

MODULE = '''"""Initial weights for fairseq2 0.8.1, written by scaletune; the groups are in fairseq2.yaml.

    class MyRecipe(TrainRecipe):
        def setup_model(self, context, model, newly_initialized):
            return initialize(model) if newly_initialized else model
"""

import re

import torch

STD = {std}


@torch.no_grad()
def initialize(model, seed=0):
    """Draw every matrix with its own std, where the model is not on the meta device (it is on all ranks but the first)."""
    generator, unused = torch.Generator().manual_seed(seed), set(STD)
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in STD if re.match(pattern, name)), None)
        unused.discard(pattern)
        if pattern is not None and not parameter.is_meta:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD[pattern])
    if unused:
        raise ValueError(f"every pattern must match a parameter, but these match none: {{sorted(unused)}}")
    return model
'''


def schedule(target: Recipe, peaks: list[float]) -> dict[str, Any]:
    """`lr_scheduler`: cosine ends at a share of each group's peak; the polynomial one is told where each of the groups ends."""
    s = resolved(target.schedule, target.budget)
    warmup = {"num_warmup_steps": round(s.warmup * target.budget.steps)}
    if s.kind == "cosine":
        return {"name": "cosine_annealing", "config": warmup | {"final_lr_scale": s.floor}}
    share = 1.0 if s.kind == "constant" else s.floor
    return {
        "name": "polynomial_decay",
        "config": warmup | {"power": 1.0, "final_lr": [share * peak for peak in peaks]},
    }


def config(transfer: Transfer, rows: list[Planned]) -> dict[str, Any]:
    """Sections of a training recipe that holds model, optimizer, lr_scheduler, trainer and regime."""
    model, t = as_llama(transfer.target.model, "fairseq2 LLaMA"), transfer.target
    if model.norm_eps != NORM_EPS:
        raise UserError(
            f"a fairseq2 LLaMA has `model.norm_eps` {NORM_EPS:g}, but the target has {model.norm_eps:g}"
        )
    groups = [{"params": group.pop("patterns"), **group} for group in named_groups(rows, NAMES)]
    o = t.optimizer
    overrides = {
        "model_dim": model.width, "max_seq_len": t.data.seq_len, "vocab_size": transfer.vocab_size, "pad_idx": None, "tied_embeddings": model.tied,
        "num_layers": model.depth, "num_attn_heads": model.heads, "num_key_value_heads": model.kv_heads or model.heads,
        "ffn_inner_dim": model.ffn_width, "ffn_inner_dim_scale": 1.0, "ffn_inner_dim_multiplier": 1.0, "ffn_inner_dim_multiple_of": 1,
        "rope_theta": model.rope_theta, "use_scaled_rope": False, "dropout_p": 0.0, "init_std_scale": "none",
        "init_std": next(row.init_std for row in rows if row.name.endswith("v_proj.weight")),
    }  # fmt: skip
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
    """`fairseq2.yaml`, `scaletune_fairseq2.py`, and `param_groups.json` with what they cannot hold and the evidence."""
    as_llama(transfer.target.model, "fairseq2 LLaMA")
    carried(transfer.target, "fairseq2", kinds=("constant", "linear", "cosine"))
    rows = without_multipliers(transfer, "fairseq2")
    return written(folder, {
        "fairseq2.yaml": yaml.safe_dump(config(transfer, rows), sort_keys=False, width=200),
        "scaletune_fairseq2.py": MODULE.format(std=stds(rows, NAMES)),
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n",
    })  # fmt: skip
