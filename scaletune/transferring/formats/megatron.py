"""Writes an argument list for Megatron-LM (0044db1f), and a module that installs groups and init.

Megatron's own muP does not scale weight decay and the eps of embedding and gains, and initializes
output projections with sigma / sqrt(2L m). At 0044db1f it also divides an untied head twice, by
its lr and by the logits multiplier; Megatron-Core 0.19.2 keeps the base lr and init std for the
head, and divides its logits only. The base hidden size is therefore set to the target's own, where
muP is only three multipliers: embedding, logits, and the softmax scale sqrt(mup_base_head_dim) /
head_dim. The residual multiplier is folded into the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaletune.recipe import Recipe, resolve_schedule
from scaletune.rules import TensorPlan
from scaletune.transferring.fold_multipliers import EXACT, default_multipliers, fold_except
from scaletune.transferring.formats.granite import integer_rope_theta, require_llama, write_files
from scaletune.transferring.param_groups import (
    CLIPPED,
    HALF_STEP,
    param_groups,
    require_supported,
    rows_by_name,
    share_eps,
    stds,
)
from scaletune.transferring.target import Transfer

# Transformer Engine keeps a norm's gain in the linear layer after the norm; local layers do not.
NORM_1 = r"(linear_qkv\.layer_norm_weight|input_layernorm\.weight)$"
NORM_2 = r"(linear_fc1\.layer_norm_weight|pre_mlp_layernorm\.weight)$"
NAMES = {
    "model.embed_tokens.weight": r"embedding\.word_embeddings\.weight$",
    "lm_head.weight": r"output_layer\.weight$",
    "model.norm.weight": r"decoder\.final_layernorm\.weight$",
    "input_layernorm.weight": NORM_1,
    "post_attention_layernorm.weight": NORM_2,
    **{f"self_attn.{kind}_proj.weight": r"self_attention\.linear_qkv\.weight$" for kind in "qkv"},
    "self_attn.o_proj.weight": r"self_attention\.linear_proj\.weight$",
    **{f"mlp.{kind}_proj.weight": r"mlp\.linear_fc1\.weight$" for kind in ("gate", "up")},
    "mlp.down_proj.weight": r"mlp\.linear_fc2\.weight$",
}
"""Our tensor -> pattern of its name in Megatron's GPT model."""
NATIVE = ("embedding", "attention", "logits")
CANNOT = [
    "learning rate, weight decay, eps and init std per tensor: scaletune_megatron.py sets them by"
    " name",
    f"residual multiplier: {EXACT}",
    CLIPPED,
    "Megatron's own muP scaling: mup_base_hidden_size equals hidden_size here, so that the width"
    " multiplier is 1; do not set it to the proxy's",
    "data, tokenizer, parallelism and precision: add them; Megatron pads the vocabulary as"
    " --make-vocab-size-divisible-by requires",
    "a tied head with pipeline stages: no pattern matches the last stage's copy of the embedding,"
    " so scaletune_megatron.py refuses it",
    HALF_STEP,
]

COMMON = '''
import re

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.tensor_parallel import get_cuda_rng_tracker

GROUPS = {groups}
STD = {std}


def overrides(chunks):
    """Returns ParamKey -> override.

    Each parameter must match exactly one pattern. Each pattern must match a parameter, unless
    another pipeline stage holds it.
    """
    unused = {{pattern for pattern, _ in GROUPS}}
    for name in (name for chunk in chunks for name, _ in chunk.named_parameters()):
        hits = [pattern for pattern, _ in GROUPS if re.search(pattern, name)]
        if len(hits) != 1:
            raise ValueError(f"one pattern must match {{name}}, but it matches {{hits}}")
        unused -= set(hits)
    if unused and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        raise ValueError(f"every pattern must match a parameter, but not these: {{sorted(unused)}}")

    def key(pattern):
        matches = lambda _, name: bool(re.search(pattern, name))
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=pattern, fn=matches))

    return {{key(pattern): dict(settings) for pattern, settings in GROUPS}}


@torch.no_grad()
def start(chunks):
    """Draws each matrix with its own std, from the ranks' own generators.

    The embedding keeps the weights that Megatron draws with its init_method_std.
    """
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        std = next((std for pattern, std in STD.items() if re.search(pattern, name)), None)
        if std is not None:
            with get_cuda_rng_tracker().fork():
                parameter.normal_(0.0, std)
'''
MODULE = (
    '''"""Groups and initial weights for Megatron-LM at 0044db1f, written by scaletune.

The arguments are in megatron.args. At the top of pretrain_gpt.py, before `pretrain` is called:

    import scaletune_megatron
    scaletune_megatron.install()
"""
'''
    + COMMON
    + '''

def install():
    """Makes `pretrain` draw these initial weights and use these groups in its optimizer."""
    from megatron.training import training

    build = training.get_megatron_optimizer

    def build_with_groups(config, model, config_overrides=None, **rest):
        start(model)
        return build(config, model, config_overrides=overrides(model), **rest)

    training.get_megatron_optimizer = build_with_groups
'''
)


def groups(target: Recipe, rows: list[TensorPlan]) -> list[tuple[str, dict[str, float]]]:
    """Name pattern -> its override.

    Checkpoints identify a group by lr_mult and wd_mult, not by max_lr, so each group has its own
    lr_mult. Nothing else reads lr_mult.
    """
    o, floor = target.optimizer, resolve_schedule(target.schedule, target.budget).floor
    by_name = rows_by_name(rows, NAMES)
    distinct = list(dict.fromkeys((row.lr, row.weight_decay, row.eps) for row in by_name.values()))

    def override(row: TensorPlan) -> dict[str, float]:
        return {
            "max_lr": row.lr,
            "min_lr": floor * row.lr,
            "eps": row.eps,
            "wd_mult": row.weight_decay / o.weight_decay if o.weight_decay else 1.0,
            "lr_mult": 1.0 + distinct.index((row.lr, row.weight_decay, row.eps)),
        }

    return [(pattern, override(row)) for pattern, row in by_name.items()]


def schedule(target: Recipe) -> dict[str, Any]:
    """Arguments of the scheduler, which moves each group from 0 to max_lr and down to min_lr."""
    s, steps = resolve_schedule(target.schedule, target.budget), target.budget.steps
    fields = {
        "lr_decay_style": "WSD" if s.kind == "wsd" else s.kind,
        "lr_decay_iters": steps,
        "lr_warmup_iters": round(s.warmup * steps),
    }
    if s.kind == "wsd":
        fields |= {
            "lr_wsd_decay_style": "linear",
            "lr_wsd_decay_iters": round(s.decay * steps),
        }
    return fields


def mup_arguments(transfer: Transfer, multipliers: dict[str, float]) -> dict[str, Any]:
    """Arguments of Megatron's muP; none if all multipliers are those of an ordinary model."""
    model = require_llama(transfer.target.model, "Megatron GPT")
    default = default_multipliers(model.head_dim)
    if all(abs(multipliers[name] / value - 1) < 1e-12 for name, value in default.items()):
        return {}
    return {
        "use_mup": True,
        "mup_base_hidden_size": model.width,
        "mup_embedding_mult": multipliers["embedding"],
        "mup_output_mult": multipliers["logits"],
        "mup_base_head_dim": (multipliers["attention"] * model.head_dim) ** 2,
    }


def rewrite_plan(
    transfer: Transfer, stack: str, native: Sequence[str] = NATIVE
) -> tuple[list[TensorPlan], list[str], dict[str, float]]:
    """Returns rows as Megatron's GPT holds them, sentences on changed eps, and multipliers."""
    require_llama(transfer.target.model, "Megatron GPT")
    require_supported(transfer.target, stack)
    rows, multipliers = fold_except(transfer, native)
    return (*share_eps(rows, NAMES), multipliers)


def settings(
    transfer: Transfer, rows: list[TensorPlan], multipliers: dict[str, float]
) -> dict[str, Any]:
    """Arguments by their Python names; True is a bare flag, False is left out."""
    model = require_llama(transfer.target.model, "Megatron GPT")
    t, o = transfer.target, transfer.target.optimizer
    grouped = (
        {}
        if model.kv_heads in (None, model.heads)
        else {"group_query_attention": True, "num_query_groups": model.kv_heads}
    )
    return {
        "num_layers": model.depth,
        "hidden_size": model.width,
        "ffn_hidden_size": model.ffn_width,
        "num_attention_heads": model.heads,
        "kv_channels": model.head_dim,
        **grouped,
        "seq_length": t.data.seq_len,
        "max_position_embeddings": t.data.seq_len,
        "position_embedding_type": "rope",
        "rotary_base": integer_rope_theta(model, "Megatron GPT"),
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": rows[0].init_std,
        **mup_arguments(transfer, multipliers),
        "optimizer": "adam",
        "lr": o.lr,
        "min_lr": resolve_schedule(t.schedule, t.budget).floor * o.lr,
        "weight_decay": o.weight_decay,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_eps": o.eps,
        "clip_grad": o.clip,
        **schedule(t),
        "global_batch_size": t.budget.batch_tokens // t.data.seq_len,
        "train_iters": t.budget.steps,
    }


def arguments(values: dict[str, Any]) -> str:
    """One `--name value` per line."""
    flags = {"--" + name.replace("_", "-"): v for name, v in values.items() if v is not False}
    return "".join(f"{flag}\n" if v is True else f"{flag} {v}\n" for flag, v in flags.items())


def render_module(text: str, transfer: Transfer, rows: list[TensorPlan], **more: Any) -> str:
    """Fills groups and stds into a module's source."""
    listed = "[\n" + "".join(f"    {group!r},\n" for group in groups(transfer.target, rows)) + "]"
    std = stds(rows, NAMES)
    del std[NAMES["model.embed_tokens.weight"]]
    return text.format(groups=listed, std=std, **more)


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes megatron.args, scaletune_megatron.py, and param_groups.json with the evidence."""
    rows, changed_eps, multipliers = rewrite_plan(transfer, "megatron")
    beside = param_groups(transfer, rows, CANNOT + changed_eps, multipliers)
    texts = {
        "megatron.args": arguments(settings(transfer, rows, multipliers)),
        "scaletune_megatron.py": render_module(MODULE, transfer, rows),
        "param_groups.json": json.dumps(beside, indent=1) + "\n",
    }
    return write_files(folder, texts)
