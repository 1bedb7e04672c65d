"""Writes a trainer YAML for the Cerebras modelzoo (18bcbd2d, release 2.10).

The YAML holds the whole plan: globs of parameter names give tags, and each tag has its own lr and
weight-decay schedulers. Cerebras' own muP does not scale weight decay and initializes output
projections with sigma / sqrt(2L m). Its base sizes are therefore set to the target's own sizes,
where it only scales the logits, and each tensor's init std is set by its own initializer. There is
one eps for all tensors: embedding and head are rewritten by the exact shift to share the hidden
matrices' eps.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolve_schedule
from scaletune.rules import TensorPlan, shift
from scaletune.transferring.fold_multipliers import EXACT, fold_except
from scaletune.transferring.formats.granite import require_llama, write_files
from scaletune.transferring.param_groups import (
    CLIPPED,
    HALF_STEP,
    named_groups,
    param_groups,
    require_supported,
    rows_by_name,
)
from scaletune.transferring.target import Transfer
from scaletune.zoo import TransformerConfig

NAMES = {
    "model.embed_tokens.weight": "*embedding_layer.word_embeddings.weight",
    "lm_head.weight": "*lm_head.weight",
    "model.norm.weight": "*ln_f.weight",
    "input_layernorm.weight": "*.norm1.weight",
    "post_attention_layernorm.weight": "*.norm3.weight",
    "self_attn.q_proj.weight": "*self_attn.proj_q_dense_layer.weight",
    "self_attn.k_proj.weight": "*self_attn.proj_k_dense_layer.weight",
    "self_attn.v_proj.weight": "*self_attn.proj_v_dense_layer.weight",
    "self_attn.o_proj.weight": "*self_attn.proj_output_dense_layer.weight",
    "mlp.gate_proj.weight": "*ffn.ffn.0.linear_layer_for_glu.weight",
    "mlp.up_proj.weight": "*ffn.ffn.0.linear_layer.weight",
    "mlp.down_proj.weight": "*ffn.ffn.1.linear_layer.weight",
}
INITIALIZERS = {
    "embedding_initializer": ("model.embed_tokens.weight",),
    "initializer": tuple(f"self_attn.{kind}_proj.weight" for kind in "qkv"),
    "output_layer_initializer": ("self_attn.o_proj.weight",),
    "ffn_initializer": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn_output_layer_initializer": ("mlp.down_proj.weight",),
}
"""Cerebras' initializer -> the tensors that it draws."""

OUTPUT_INITIALIZERS = ("output_layer_initializer", "ffn_output_layer_initializer")
"""Initializers whose std Cerebras' muP divides by sqrt(2L)."""

CANNOT = [
    f"multipliers of hidden matrices: {EXACT}",
    CLIPPED,
    "eps per tensor: Cerebras has one eps, which all tensors of this plan share",
    "eps with bias correction: Cerebras' AdamW adds eps before it divides by sqrt(1 - beta2**step),"
    " so eps has a larger effect in the first steps",
    "data, sharding, precision and checkpoints: add them to the YAML",
    HALF_STEP,
]


def rewrite_plan(transfer: Transfer) -> tuple[list[TensorPlan], dict[str, float]]:
    """Rewrites the plan so that all tensors share one eps; returns rows and multipliers."""
    rows, multipliers = fold_except(transfer, ("embedding", "attention", "logits"))
    eps = next(row.eps for row in rows if row.role == "hid")
    theta = {row.name: eps / row.eps for row in rows if row.role in ("emb", "out")}
    rows = [replace(shift(row, theta.get(row.name, 1.0)), multiplier=1.0) for row in rows]
    if max(row.eps for row in rows) > min(row.eps for row in rows) * (1 + 1e-9):
        raise UserError(
            "format 'cerebras' has one eps for all tensors, but the plan needs"
            f" {sorted({row.eps for row in rows})}: set depth_alpha = 0, residual_multiplier = 1"
            " and as many key-value heads as heads, or emit 'pytorch'"
        )
    embedding = theta["model.embed_tokens.weight"]
    head = theta.get("lm_head.weight", embedding)  # tied: the same tensor
    shifts = {"embedding": embedding, "logits": head}
    return rows, {name: value * shifts.get(name, 1.0) for name, value in multipliers.items()}


def initializers(rows: list[TensorPlan], depth: int, by_mup: bool) -> dict[str, Any]:
    """Cerebras' five initializers and the head's std; UserError if one needs two stds."""
    by_kind = rows_by_name(rows, {kind: kind for kind in NAMES})
    settings: dict[str, Any] = {}
    for name, kinds in INITIALIZERS.items():
        stds = {by_kind[kind].init_std for kind in kinds}
        if max(stds) > min(stds) * (1 + 1e-9):
            raise UserError(
                f"format 'cerebras' has one `{name}` for {', '.join(kinds)},"
                f" but the plan has {sorted(stds)}: emit 'pytorch'"
            )
        undo_mup = (2 * depth) ** 0.5 if by_mup and name in OUTPUT_INITIALIZERS else 1.0
        settings[name] = {"name": "normal", "mean": 0.0, "std": min(stds) * undo_mup}
    head = by_kind.get("lm_head.weight", by_kind["model.embed_tokens.weight"])
    return settings | {"initializer_range": head.init_std}


def model_config(
    transfer: Transfer,
    model: TransformerConfig,
    rows: list[TensorPlan],
    multipliers: dict[str, float],
) -> dict[str, Any]:
    """Keys of LlamaModelConfig; muP's keys only if the logits have a multiplier."""
    by_mup = abs(multipliers["logits"] - 1) > 1e-12
    mup = {
        "mup_base_hidden_size": model.width,
        "mup_base_filter_size": model.ffn_width,
        "scale_output_logits_by_d": True,
        "output_logits_alpha": multipliers["logits"],
    }
    attention: dict[str, Any] = {"attention_module": "aiayn_attention"}
    if model.kv_heads not in (None, model.heads):
        attention = {
            "attention_module": "multiquery_attention",
            "extra_attention_params": {"num_kv_groups": model.kv_heads},
        }
    return {
        "name": "llama",
        "vocab_size": transfer.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_heads": model.heads,
        "filter_size": model.ffn_width,
        "nonlinearity": "swiglu",
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": model.norm_eps,
        "max_position_embeddings": transfer.target.data.seq_len,
        "position_embedding_type": "rotary",
        "rotary_dim": model.head_dim,
        "rope_theta": model.rope_theta,
        "fold_rope_consts": True,
        "share_embedding_weights": model.tied,
        "use_bias_in_output": False,
        "use_ffn_bias": False,
        "use_ffn_bias_in_attention": False,
        "use_projection_bias_in_attention": False,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
        "embedding_dropout_rate": 0.0,
        "attention_type": "scaled_dot_product",
        **attention,
        "scale_qk_dot_by_d": False,
        "attention_logits_alpha": multipliers["attention"] * model.head_dim**0.5,
        "embeddings_scale": multipliers["embedding"],
        **(mup if by_mup else {}),
        **initializers(rows, model.depth, by_mup),
    }


def phases(target: Recipe, peak: float) -> list[dict[str, Any]]:
    """The lr of one tag as consecutive schedulers: warmup, constant, decay."""
    s, steps = resolve_schedule(target.schedule, target.budget), target.budget.steps
    warmup, end = round(s.warmup * steps), s.floor * peak
    down = {"constant": 0, "wsd": round(s.decay * steps)}.get(s.kind, steps - warmup)
    decay = "CosineDecayLR" if s.kind == "cosine" else "LinearLR"
    schedulers = [
        ("LinearLR", {"initial_learning_rate": 0.0, "end_learning_rate": peak}, warmup),
        ("ConstantLR", {"learning_rate": peak}, steps - warmup - down),
        (decay, {"initial_learning_rate": peak, "end_learning_rate": end}, down),
    ]
    return [{name: fields | {"total_iters": count}} for name, fields, count in schedulers if count]


def schedulers(target: Recipe, tag: str, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The lr and weight-decay schedulers of one tag."""
    of_lr = phases(target, lr)
    if len(of_lr) == 1:
        [(name, fields)] = of_lr[0].items()
        scheduler = {name: fields | {"param_group_tags": tag}}
    else:
        scheduler = {"SequentialLR": {"schedulers": of_lr, "param_group_tags": tag}}
    steps = target.budget.steps
    decay = {"val": weight_decay, "total_iters": steps, "param_group_tags": tag}
    return [scheduler, {"ConstantWD": decay}]


def config(
    transfer: Transfer, rows: list[TensorPlan], multipliers: dict[str, float]
) -> dict[str, Any]:
    """`trainer.init`, and the batch size of `trainer.fit`."""
    model, t = require_llama(transfer.target.model, "Cerebras LLaMA"), transfer.target
    tagged = [(f"scaletune_{i}", group) for i, group in enumerate(named_groups(rows, NAMES))]
    adamw = {
        "betas": [t.optimizer.beta1, t.optimizer.beta2],
        "eps": rows[0].eps,
        "weight_decay": t.optimizer.weight_decay,
        "correct_bias": True,
        "params": [{"params": group["patterns"], "tag": tag} for tag, group in tagged],
    }
    init = {
        "model": model_config(transfer, model, rows, multipliers),
        "optimizer": {"AdamW": adamw},
        "schedulers": [
            each
            for tag, group in tagged
            for each in schedulers(t, tag, group["lr"], group["weight_decay"])
        ],
        "loop": {"max_steps": t.budget.steps},
        "precision": {"max_gradient_norm": t.optimizer.clip},
    }
    batch_size = t.budget.batch_tokens // t.data.seq_len
    return {"trainer": {"init": init, "fit": {"train_dataloader": {"batch_size": batch_size}}}}


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes cerebras.yaml, and param_groups.json with what it cannot hold and the evidence."""
    require_llama(transfer.target.model, "Cerebras LLaMA")
    require_supported(transfer.target, "cerebras")
    rows, multipliers = rewrite_plan(transfer)
    content = config(transfer, rows, multipliers)
    groups = param_groups(transfer, rows, CANNOT, multipliers)
    texts = {
        "cerebras.yaml": yaml.safe_dump(content, sort_keys=False, width=200),
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
    }
    return write_files(folder, texts)
