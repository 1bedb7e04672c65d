"""Cerebras modelzoo at 18bcbd2d (2.10): a trainer YAML that holds the whole plan, by tags on globs of names, or none of it.

Its own muP leaves weight decay and starts output projections at sigma / sqrt(2L m), so it is given the target's own sizes as the base, where
it scales logits alone; every tensor's init std is then its own initializer's, and lr and weight decay are schedulers of its tag. Eps is one
for all: embedding and head are rewritten by the exact shift so that they share the hidden matrices'.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolved
from scaletune.rules import Planned, shift
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, partly_folded
from scaletune.transferring.formats.granite import as_llama, written
from scaletune.transferring.param_groups import (
    CLIPPED,
    by_name,
    carried,
    named_groups,
    param_groups,
)
from scaletune.zoo import Transformer

NAMES = {
    "model.embed_tokens.weight": "*embedding_layer.word_embeddings.weight", "lm_head.weight": "*lm_head.weight", "model.norm.weight": "*ln_f.weight",
    "input_layernorm.weight": "*.norm1.weight", "post_attention_layernorm.weight": "*.norm3.weight",
    "self_attn.q_proj.weight": "*self_attn.proj_q_dense_layer.weight", "self_attn.k_proj.weight": "*self_attn.proj_k_dense_layer.weight",
    "self_attn.v_proj.weight": "*self_attn.proj_v_dense_layer.weight", "self_attn.o_proj.weight": "*self_attn.proj_output_dense_layer.weight",
    "mlp.gate_proj.weight": "*ffn.ffn.0.linear_layer_for_glu.weight", "mlp.up_proj.weight": "*ffn.ffn.0.linear_layer.weight",
    "mlp.down_proj.weight": "*ffn.ffn.1.linear_layer.weight",
}  # fmt: skip
SLOTS = {  # its initializers -> what they draw
    "embedding_initializer": ("model.embed_tokens.weight",), "initializer": tuple(f"self_attn.{kind}_proj.weight" for kind in "qkv"),
    "output_layer_initializer": ("self_attn.o_proj.weight",), "ffn_initializer": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn_output_layer_initializer": ("mlp.down_proj.weight",),
}  # fmt: skip
LASTS = (
    "output_layer_initializer",
    "ffn_output_layer_initializer",
)  # which its muP divides by sqrt(2L)
CANNOT = [
    f"multipliers of hidden matrices: {EXACT}", CLIPPED,
    "eps by tensor: it has one, which all tensors of this plan share",
    "bias correction of eps: its AdamW adds eps before it divides by sqrt(1 - beta2**step), so eps acts larger in the first steps",
    "data, sharding, precision and checkpoints: add them to the YAML",
    "half a step: warmup counts whole steps, where the plan's schedule is read in the middle of each",
]  # fmt: skip


def rewritten(transfer: Transfer) -> tuple[list[Planned], dict[str, float]]:
    """Rows that share one eps, and the multipliers that go with them; UserError where the plan needs several."""
    rows, multipliers = partly_folded(transfer, ("embedding", "attention", "logits"))
    eps = next(row.eps for row in rows if row.role == "hid")
    theta = {row.name: eps / row.eps for row in rows if row.role in ("emb", "out")}
    rows = [replace(shift(row, theta.get(row.name, 1.0)), multiplier=1.0) for row in rows]
    if max(row.eps for row in rows) > min(row.eps for row in rows) * (1 + 1e-9):
        raise UserError(
            f"format 'cerebras' has one eps for all tensors, but the plan needs {sorted({row.eps for row in rows})}:"
            " set depth_alpha = 0 and residual_multiplier = 1, or emit 'pytorch'"
        )
    embedding = theta["model.embed_tokens.weight"]
    more = {
        "embedding": embedding,
        "logits": theta.get("lm_head.weight", embedding),
    }  # tied: the same tensor
    return rows, {name: value * more.get(name, 1.0) for name, value in multipliers.items()}


def initializers(rows: list[Planned], depth: int, by_mup: bool) -> dict[str, Any]:
    """Its five initializers and the head's std; UserError where one would have to draw two stds."""
    named = by_name(rows, {kind: kind for kind in NAMES})
    found: dict[str, Any] = {}
    for slot, kinds in SLOTS.items():
        stds = {named[kind].init_std for kind in kinds}
        if max(stds) > min(stds) * (1 + 1e-9):
            raise UserError(
                f"format 'cerebras' has one `{slot}` for {', '.join(kinds)}, but the plan has {sorted(stds)}: emit 'pytorch'"
            )
        undone = (2 * depth) ** 0.5 if by_mup and slot in LASTS else 1.0
        found[slot] = {"name": "normal", "mean": 0.0, "std": min(stds) * undone}
    head = named.get("lm_head.weight", named["model.embed_tokens.weight"])
    return found | {"initializer_range": head.init_std}


def model_config(
    transfer: Transfer, model: Transformer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """Keys of its LlamaModelConfig; muP's own only where the logits have a multiplier."""
    by_mup = abs(multipliers["logits"] - 1) > 1e-12
    own = {
        "mup_base_hidden_size": model.width, "mup_base_filter_size": model.ffn_width, "scale_output_logits_by_d": True,
        "output_logits_alpha": multipliers["logits"],
    }  # fmt: skip
    grouped: dict[str, Any] = {"attention_module": "aiayn_attention"}
    if model.kv_heads not in (None, model.heads):
        grouped = {
            "attention_module": "multiquery_attention",
            "extra_attention_params": {"num_kv_groups": model.kv_heads},
        }
    return {
        "name": "llama", "vocab_size": transfer.vocab_size, "hidden_size": model.width, "num_hidden_layers": model.depth,
        "num_heads": model.heads, "filter_size": model.ffn_width, "nonlinearity": "swiglu", "norm_type": "rmsnorm",
        "layer_norm_epsilon": model.norm_eps, "max_position_embeddings": transfer.target.data.seq_len, "position_embedding_type": "rotary",
        "rotary_dim": model.head_dim, "rope_theta": model.rope_theta, "fold_rope_consts": True, "share_embedding_weights": model.tied,
        "use_bias_in_output": False, "use_ffn_bias": False, "use_ffn_bias_in_attention": False, "use_projection_bias_in_attention": False,
        "dropout_rate": 0.0, "attention_dropout_rate": 0.0, "embedding_dropout_rate": 0.0, "attention_type": "scaled_dot_product",
        **grouped, "scale_qk_dot_by_d": False, "attention_logits_alpha": multipliers["attention"] * model.head_dim**0.5,
        "embeddings_scale": multipliers["embedding"], **(own if by_mup else {}), **initializers(rows, model.depth, by_mup),
    }  # fmt: skip


def phases(target: Recipe, peak: float) -> list[dict[str, Any]]:
    """The learning rate of one tag, as schedulers that follow each other."""
    s, steps = resolved(target.schedule, target.budget), target.budget.steps
    warmup, end = round(s.warmup * steps), s.floor * peak
    down = {"constant": 0, "wsd": round(s.decay * steps)}.get(s.kind, steps - warmup)
    decay = "CosineDecayLR" if s.kind == "cosine" else "LinearLR"
    found = [
        ("LinearLR", {"initial_learning_rate": 0.0, "end_learning_rate": peak}, warmup),
        ("ConstantLR", {"learning_rate": peak}, steps - warmup - down),
        (decay, {"initial_learning_rate": peak, "end_learning_rate": end}, down),
    ]
    return [{name: fields | {"total_iters": count}} for name, fields, count in found if count]


def schedulers(target: Recipe, tag: str, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Those of one tag: its learning rate and its weight decay."""
    (name, fields), *rest = (next(iter(phase.items())) for phase in phases(target, lr))
    alone = {name: fields | {"param_group_tags": tag}}
    several = {"SequentialLR": {"schedulers": phases(target, lr), "param_group_tags": tag}}
    return [
        several if rest else alone,
        {
            "ConstantWD": {
                "val": weight_decay,
                "total_iters": target.budget.steps,
                "param_group_tags": tag,
            }
        },
    ]


def config(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """`trainer.init` and the batch size of `trainer.fit`."""
    model, t = as_llama(transfer.target.model, "Cerebras LLaMA"), transfer.target
    tagged = [(f"scaletune_{i}", group) for i, group in enumerate(named_groups(rows, NAMES))]
    adamw = {
        "betas": [t.optimizer.beta1, t.optimizer.beta2], "eps": rows[0].eps, "weight_decay": t.optimizer.weight_decay, "correct_bias": True,
        "params": [{"params": group["patterns"], "tag": tag} for tag, group in tagged],
    }  # fmt: skip
    return {"trainer": {
        "init": {
            "model": model_config(transfer, model, rows, multipliers),
            "optimizer": {"AdamW": adamw},
            "schedulers": [each for tag, group in tagged for each in schedulers(t, tag, group["lr"], group["weight_decay"])],
            "loop": {"max_steps": t.budget.steps},
            "precision": {"max_gradient_norm": t.optimizer.clip},
        },
        "fit": {"train_dataloader": {"batch_size": t.budget.batch_tokens // t.data.seq_len}},
    }}  # fmt: skip


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`cerebras.yaml`, and `param_groups.json` with what it cannot hold and the evidence."""
    as_llama(transfer.target.model, "Cerebras LLaMA")
    carried(transfer.target, "cerebras")
    rows, multipliers = rewritten(transfer)
    return written(folder, {
        "cerebras.yaml": yaml.safe_dump(config(transfer, rows, multipliers), sort_keys=False, width=200),
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT, multipliers), indent=1) + "\n",
    })  # fmt: skip
