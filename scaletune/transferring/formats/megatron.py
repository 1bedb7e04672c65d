"""Megatron-LM at 0044db1f: an argument list with the forward multipliers of its muP, and a loader for groups and init.

Its own muP divides an untied head twice, leaves weight decay and the embedding's eps, and starts output projections at sigma / sqrt(2L m). It
is therefore given the target's own hidden size as the base, where it is three multipliers and nothing else: the embedding's, the logits' and
sqrt(mup_base_head_dim) / head_dim of the softmax. Residual branches are written into the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaletune.recipe import Recipe, resolved
from scaletune.rules import Planned
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, neutral, partly_folded
from scaletune.transferring.formats.granite import as_llama, whole_theta, written
from scaletune.transferring.param_groups import (
    CLIPPED,
    by_name,
    carried,
    merged,
    param_groups,
    stds,
)

NAMES = {  # of its GPT model: Transformer Engine keeps a block's norms in the linear maps after them, its local layers do not
    "model.embed_tokens.weight": r"embedding\.word_embeddings\.weight$", "lm_head.weight": r"output_layer\.weight$",
    "model.norm.weight": r"decoder\.final_layernorm\.weight$", "input_layernorm.weight": r"(linear_qkv\.layer_norm_weight|input_layernorm\.weight)$",
    "post_attention_layernorm.weight": r"(linear_fc1\.layer_norm_weight|pre_mlp_layernorm\.weight)$",
    **{f"self_attn.{kind}_proj.weight": r"self_attention\.linear_qkv\.weight$" for kind in "qkv"},
    "self_attn.o_proj.weight": r"self_attention\.linear_proj\.weight$",
    **{f"mlp.{kind}_proj.weight": r"mlp\.linear_fc1\.weight$" for kind in ("gate", "up")},
    "mlp.down_proj.weight": r"mlp\.linear_fc2\.weight$",
}  # fmt: skip
NATIVE = ("embedding", "attention", "logits")
CANNOT = [
    "learning rate, weight decay, eps and init std of each tensor: the loader beside it sets them by name",
    f"residual multiplier: {EXACT}", CLIPPED,
    "its own muP scaling: mup_base_hidden_size is hidden_size here, so that its width multiplier is 1; do not set it to the proxy's",
    "data, tokenizer, parallelism and precision: add them; the vocabulary is padded as --make-vocab-size-divisible-by says",
    "a tied head with pipeline stages: the last one's copy of the embedding has no pattern, so the loader refuses it",
    "half a step: warmup counts whole iterations, where the plan's schedule is read in the middle of each",
]  # fmt: skip

COMMON = '''
import re

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.tensor_parallel import get_cuda_rng_tracker

GROUPS = {groups}
STD = {std}


def overrides(chunks):
    """ParamKey -> override; one pattern must match each parameter, and each pattern one, but for what other pipeline stages hold."""
    unused = {{pattern for pattern, _ in GROUPS}}
    for name in (name for chunk in chunks for name, _ in chunk.named_parameters()):
        hits = [pattern for pattern, _ in GROUPS if re.search(pattern, name)]
        if len(hits) != 1:
            raise ValueError(f"one pattern must match every parameter, but {{name}} is matched by {{hits}}")
        unused -= set(hits)
    if unused and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        raise ValueError(f"every pattern must match a parameter, but these match none: {{sorted(unused)}}")
    return {{
        ParamKey(with_name_predicate=ParamWithNamePredicate(name=p, fn=lambda _, name, p=p: bool(re.search(p, name)))): dict(settings)
        for p, settings in GROUPS
    }}


@torch.no_grad()
def start(chunks):
    """Draw every matrix but the embedding, which has --init-method-std, with its own std, from the ranks' own generators."""
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        std = next((std for pattern, std in STD.items() if re.search(pattern, name)), None)
        if std is not None:
            with get_cuda_rng_tracker().fork():
                parameter.normal_(0.0, std)
'''
MODULE = (
    '''"""Groups and initial weights for Megatron-LM at 0044db1f, written by scaletune; the arguments are in megatron.args.

At the top of pretrain_gpt.py, before `pretrain` is called:

    import scaletune_megatron
    scaletune_megatron.install()
"""
'''
    + COMMON
    + '''

def install():
    """Draw the model and give its optimizer these groups alone, wherever `pretrain` builds one."""
    from megatron.training import training

    theirs = training.get_megatron_optimizer

    def ours(config, model, config_overrides=None, **rest):
        start(model)
        return theirs(config, model, config_overrides=overrides(model), **rest)

    training.get_megatron_optimizer = ours
'''
)


def groups(target: Recipe, rows: list[Planned]) -> list[tuple[str, dict[str, float]]]:
    """Name pattern -> its override. lr_mult is read by nothing but checkpoints, which tell groups apart by it and wd_mult, not by max_lr."""
    o, floor = target.optimizer, resolved(target.schedule, target.budget).floor
    named = by_name(rows, NAMES)
    kept = list(dict.fromkeys((row.lr, row.weight_decay, row.eps) for row in named.values()))

    def override(row: Planned) -> dict[str, float]:
        decay = {"wd_mult": row.weight_decay / o.weight_decay if o.weight_decay else 1.0}
        which = {"lr_mult": 1.0 + kept.index((row.lr, row.weight_decay, row.eps))}
        return {"max_lr": row.lr, "min_lr": floor * row.lr, "eps": row.eps, **decay, **which}

    return [(pattern, override(row)) for pattern, row in named.items()]


def schedule(target: Recipe) -> dict[str, Any]:
    """Fields of its scheduler, which takes every group from 0 to its own max_lr and down to its own min_lr."""
    s, steps = resolved(target.schedule, target.budget), target.budget.steps
    down = (
        {"lr_wsd_decay_style": "linear", "lr_wsd_decay_iters": round(s.decay * steps)}
        if s.kind == "wsd"
        else {}
    )
    style = "WSD" if s.kind == "wsd" else s.kind
    return {
        "lr_decay_style": style,
        "lr_decay_iters": steps,
        "lr_warmup_iters": round(s.warmup * steps),
    } | down


def multiplied(transfer: Transfer, multipliers: dict[str, float]) -> dict[str, Any]:
    """Fields of its muP, none where no multiplier differs from an ordinary model's."""
    model = as_llama(transfer.target.model, "Megatron GPT")
    if all(
        abs(multipliers[name] / value - 1) < 1e-12
        for name, value in neutral(model.head_dim).items()
    ):
        return {}
    return {
        "use_mup": True, "mup_base_hidden_size": model.width, "mup_embedding_mult": multipliers["embedding"],
        "mup_output_mult": multipliers["logits"], "mup_base_head_dim": (multipliers["attention"] * model.head_dim) ** 2,
    }  # fmt: skip


def rewritten(
    transfer: Transfer, stack: str, native: Sequence[str] = NATIVE
) -> tuple[list[Planned], list[str], dict[str, float]]:
    """Rows as its GPT model holds them, what of the plan that changes, and multipliers; UserError where it cannot train the target."""
    as_llama(transfer.target.model, "Megatron GPT")
    carried(transfer.target, stack)
    rows, multipliers = partly_folded(transfer, native)
    return (*merged(rows, NAMES), multipliers)


def settings(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """Arguments by their names in Python; True is a bare flag, False none."""
    model, t, o = (
        as_llama(transfer.target.model, "Megatron GPT"),
        transfer.target,
        transfer.target.optimizer,
    )
    few = (
        {}
        if model.kv_heads in (None, model.heads)
        else {"group_query_attention": True, "num_query_groups": model.kv_heads}
    )
    return {
        "num_layers": model.depth, "hidden_size": model.width, "ffn_hidden_size": model.ffn_width,
        "num_attention_heads": model.heads, "kv_channels": model.head_dim, **few, "seq_length": t.data.seq_len,
        "max_position_embeddings": t.data.seq_len, "position_embedding_type": "rope", "rotary_base": whole_theta(model, "Megatron GPT"),
        "normalization": "RMSNorm", "norm_epsilon": model.norm_eps, "swiglu": True, "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": not model.tied, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "init_method_std": rows[0].init_std, **multiplied(transfer, multipliers),
        "optimizer": "adam", "lr": o.lr, "min_lr": resolved(t.schedule, t.budget).floor * o.lr, "weight_decay": o.weight_decay,
        "adam_beta1": o.beta1, "adam_beta2": o.beta2, "adam_eps": o.eps, "clip_grad": o.clip, **schedule(t),
        "global_batch_size": t.budget.batch_tokens // t.data.seq_len, "train_iters": t.budget.steps,
    }  # fmt: skip


def arguments(told: dict[str, Any]) -> str:
    """One `--name value` a line."""
    each = [
        ("--" + name.replace("_", "-"), value) for name, value in told.items() if value is not False
    ]
    return "\n".join(name if value is True else f"{name} {value}" for name, value in each) + "\n"


def module(text: str, transfer: Transfer, rows: list[Planned], **more: Any) -> str:
    """A loader with the groups and stds put in."""
    listed = "[\n" + "".join(f"    {group!r},\n" for group in groups(transfer.target, rows)) + "]"
    std = {
        name: value
        for name, value in stds(rows, NAMES).items()
        if name != NAMES["model.embed_tokens.weight"]
    }
    return text.format(groups=listed, std=std, **more)


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`megatron.args`, `scaletune_megatron.py`, and `param_groups.json` with what they cannot hold and the evidence."""
    rows, said, multipliers = rewritten(transfer, "megatron")
    return written(folder, {
        "megatron.args": arguments(settings(transfer, rows, multipliers)),
        "scaletune_megatron.py": module(MODULE, transfer, rows),
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT + said, multipliers), indent=1) + "\n",
    })  # fmt: skip
