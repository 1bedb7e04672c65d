"""OLMo-core 3.0.0: a Python module of its config objects. Groups by globs of names; `start` draws what its one `init_std` cannot."""

from __future__ import annotations

import json
from pathlib import Path

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolved
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, without_multipliers
from scaletune.transferring.formats.granite import as_llama, whole_theta, written
from scaletune.transferring.param_groups import (
    CLIPPED,
    SCRIPT,
    carried,
    named_groups,
    param_groups,
    stds,
)

NAMES = {
    "model.embed_tokens.weight": "embeddings.weight", "lm_head.weight": "lm_head.w_out.weight", "model.norm.weight": "lm_head.norm.weight",
    "input_layernorm.weight": "blocks.*.attention_norm.weight", "post_attention_layernorm.weight": "blocks.*.feed_forward_norm.weight",
    "self_attn.q_proj.weight": "blocks.*.attention.w_q.weight", "self_attn.k_proj.weight": "blocks.*.attention.w_k.weight",
    "self_attn.v_proj.weight": "blocks.*.attention.w_v.weight", "self_attn.o_proj.weight": "blocks.*.attention.w_out.weight",
    "mlp.gate_proj.weight": "blocks.*.feed_forward.w1.weight", "mlp.up_proj.weight": "blocks.*.feed_forward.w3.weight",
    "mlp.down_proj.weight": "blocks.*.feed_forward.w2.weight",
}  # fmt: skip
CANNOT = [
    "init std of each tensor: its config has one for all matrices; call start(model) after init_weights",
    f"logits and attention multipliers: {EXACT}", SCRIPT, CLIPPED,
]  # fmt: skip

MODULE = '''"""Configs for OLMo-core 3.0.0, written by scaletune. After `model.init_weights(...)` call `start(model)`."""

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
    """Draw every matrix with its own std."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = next((std for glob, std in STD.items() if fnmatch(name, glob)), None)
        if std is not None:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
'''


def schedule(target: Recipe) -> tuple[str, dict[str, float]]:
    """(class, its fields); all multiply a group's `initial_lr`, but WSD's floor is an lr for all groups, so it must be 0."""
    s = resolved(target.schedule, target.budget)
    if s.kind == "wsd" and s.floor:
        raise UserError(
            f"format 'olmo_core' has a WSD floor in lr and not as a share: set schedule.floor = 0, but got {s.floor:g}"
        )
    name = {
        "constant": "ConstantWithWarmup",
        "wsd": "WSD",
        "linear": "LinearWithWarmup",
        "cosine": "CosWithWarmup",
    }[s.kind]
    own = {
        "wsd": {"decay_fraction": s.decay},
        "linear": {"alpha_f": s.floor},
        "cosine": {"alpha_f": s.floor},
    }.get(s.kind, {})
    return name, {"warmup_fraction": s.warmup, **own}


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`scaletune_olmo_core.py`, and `param_groups.json` with what it cannot hold and the evidence."""
    model = as_llama(transfer.target.model, "OLMo-core LLaMA")
    carried(transfer.target, "olmo_core")
    if model.tied:
        raise UserError(
            "format 'olmo_core' has no tied head: set model.tied = false, or emit 'granite'"
        )
    rows = without_multipliers(transfer, "olmo_core")
    name, fields = schedule(transfer.target)
    o = transfer.target.optimizer
    shape = {
        "d_model": model.width, "vocab_size": transfer.vocab_size, "n_layers": model.depth, "n_heads": model.heads,
        "n_kv_heads": model.kv_heads or model.heads, "layer_norm_eps": model.norm_eps, "rope_theta": whole_theta(model, "OLMo-core LLaMA"),
    }  # fmt: skip
    groups = [(group.pop("patterns"), group) for group in named_groups(rows, NAMES)]
    module = MODULE.format(
        scheduler=name, shape=shape, std=stds(rows, NAMES), groups="[\n" + "".join(f"    {group!r},\n" for group in groups) + "]",
        optimizer={"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}, ffn_width=model.ffn_width,
        arguments=", ".join(f"{key}={value!r}" for key, value in fields.items()),
    )  # fmt: skip
    said = json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n"
    return written(folder, {"scaletune_olmo_core.py": module, "param_groups.json": said})
