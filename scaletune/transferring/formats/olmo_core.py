"""Writes a Python module of config objects for OLMo-core 3.0.0.

Param groups are globs of parameter names. The config has one `init_std`, so `start` draws the
matrices.
"""

from __future__ import annotations

import json
from pathlib import Path

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolve_schedule
from scaletune.transferring.fold_multipliers import EXACT, fold_all
from scaletune.transferring.formats.granite import integer_rope_theta, require_llama, write_files
from scaletune.transferring.param_groups import (
    CLIPPED,
    SCRIPT,
    named_groups,
    param_groups,
    require_supported,
    stds,
)
from scaletune.transferring.target import Transfer

NAMES = {
    "model.embed_tokens.weight": "embeddings.weight",
    "lm_head.weight": "lm_head.w_out.weight",
    "model.norm.weight": "lm_head.norm.weight",
    "input_layernorm.weight": "blocks.*.attention_norm.weight",
    "post_attention_layernorm.weight": "blocks.*.feed_forward_norm.weight",
    "self_attn.q_proj.weight": "blocks.*.attention.w_q.weight",
    "self_attn.k_proj.weight": "blocks.*.attention.w_k.weight",
    "self_attn.v_proj.weight": "blocks.*.attention.w_v.weight",
    "self_attn.o_proj.weight": "blocks.*.attention.w_out.weight",
    "mlp.gate_proj.weight": "blocks.*.feed_forward.w1.weight",
    "mlp.up_proj.weight": "blocks.*.feed_forward.w3.weight",
    "mlp.down_proj.weight": "blocks.*.feed_forward.w2.weight",
}
CANNOT = [
    "init std per tensor: the config has one for all matrices; call start(model) after"
    " init_weights",
    f"logits and attention multipliers: {EXACT}",
    SCRIPT,
    CLIPPED,
]

MODULE = '''"""Configs for OLMo-core 3.0.0, written by scaletune.

After `model.init_weights(...)` call `start(model)`.
"""

from fnmatch import fnmatch

import torch
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig, OptimGroupOverride
from olmo_core.optim.scheduler import {scheduler}

SHAPE = {shape}
STD = {std}
GROUPS = {groups}
OPTIMIZER = {optimizer}


def model_config():
    mlp = FeedForwardConfig(hidden_size={ffn_width}, bias=False)
    return TransformerConfig.llama_like(feed_forward=mlp, **SHAPE)


def optimizer_config():
    overrides = [OptimGroupOverride(params=globs, opts=opts) for globs, opts in GROUPS]
    return AdamWConfig(group_overrides=overrides, **OPTIMIZER)


def scheduler():
    return {scheduler}({arguments})


@torch.no_grad()
def start(model, seed=0):
    """Draws each matrix with its own std."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = next((std for glob, std in STD.items() if fnmatch(name, glob)), None)
        if std is not None:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
'''


def schedule(target: Recipe) -> tuple[str, dict[str, float]]:
    """Returns a scheduler's class and fields.

    All multiply a group's `initial_lr`, except that the minimum of WSD is one lr for all groups. So
    it must be 0.
    """
    s = resolve_schedule(target.schedule, target.budget)
    if s.kind == "wsd" and s.floor:
        raise UserError(
            "OLMo-core's WSD ends at one lr for all groups, so `schedule.floor` must be 0,"
            f" but got {s.floor:g}"
        )
    warmup = {"warmup_fraction": s.warmup}
    return {
        "constant": ("ConstantWithWarmup", warmup),
        "wsd": ("WSD", warmup | {"decay_fraction": s.decay}),
        "linear": ("LinearWithWarmup", warmup | {"alpha_f": s.floor}),
        "cosine": ("CosWithWarmup", warmup | {"alpha_f": s.floor}),
    }[s.kind]


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes scaletune_olmo_core.py, and param_groups.json with the evidence."""
    model = require_llama(transfer.target.model, "OLMo-core LLaMA")
    require_supported(transfer.target, "olmo_core")
    if model.tied:
        raise UserError(
            "format 'olmo_core' has no tied head: set model.tied = false, or emit 'granite'"
        )
    rows = fold_all(transfer, "olmo_core")
    scheduler, fields = schedule(transfer.target)
    o = transfer.target.optimizer
    shape = {
        "d_model": model.width,
        "vocab_size": transfer.vocab_size,
        "n_layers": model.depth,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads or model.heads,
        "layer_norm_eps": model.norm_eps,
        "rope_theta": integer_rope_theta(model, "OLMo-core LLaMA"),
    }
    betas = (o.beta1, o.beta2)
    groups = [(group.pop("patterns"), group) for group in named_groups(rows, NAMES)]
    module = MODULE.format(
        scheduler=scheduler,
        shape=shape,
        std=stds(rows, NAMES),
        groups="[\n" + "".join(f"    {group!r},\n" for group in groups) + "]",
        optimizer={"lr": o.lr, "betas": betas, "eps": o.eps, "weight_decay": o.weight_decay},
        ffn_width=model.ffn_width,
        arguments=", ".join(f"{key}={value!r}" for key, value in fields.items()),
    )
    beside = json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n"
    return write_files(folder, {"scaletune_olmo_core.py": module, "param_groups.json": beside})
