"""LLM-Foundry 0.22.0: a training YAML of an MPT, which holds the whole plan: groups by patterns, softmax and logits scales, four init stds.

Residual branches and the embedding's multiplier are written into the weights; the head takes the hidden matrices' init std, which
`logit_scale` makes up for by the same exact shift. Its AdamW shrinks weights by lr / peak * weight_decay each step, so lr * weight_decay is
what it is told. A pattern that matches nothing gives an empty group in silence: those here are checked against MPT's own names.
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
    "model.embed_tokens.weight": r"\bwte\.weight$", "lm_head.weight": r"\blm_head\.weight$", "model.norm.weight": r"\bnorm_f\.weight$",
    "input_layernorm.weight": r"\bnorm_1\.weight$", "post_attention_layernorm.weight": r"\bnorm_2\.weight$",
    "self_attn.q_proj.weight": r"attn\.Wq\.weight$", "self_attn.k_proj.weight": r"attn\.Wk\.weight$",
    "self_attn.v_proj.weight": r"attn\.Wv\.weight$", "self_attn.o_proj.weight": r"attn\.out_proj\.weight$",
    "mlp.gate_proj.weight": r"ffn\.gate_proj\.weight$", "mlp.up_proj.weight": r"ffn\.up_proj\.weight$",
    "mlp.down_proj.weight": r"ffn\.down_proj\.weight$",
}  # fmt: skip
LASTS = ("o_proj.weight", "down_proj.weight")  # what it divides by `init_div_is_residual`
CANNOT = [
    f"embedding and residual multipliers: {EXACT}", CLIPPED,
    "data, tokenizer, sharding and evaluation: add them to the YAML; its vocabulary must be the tokenizer's",
    "half a step: warmup counts whole batches, where the plan's schedule is read in the middle of each",
]  # fmt: skip


def rewritten(transfer: Transfer) -> tuple[list[Planned], dict[str, float]]:
    """Rows and multipliers as MPT can hold them: an untied head starts as the hidden matrices do."""
    rows, multipliers = partly_folded(transfer, ("attention", "logits"))
    hidden = next(row.init_std for row in rows if row.name.endswith("v_proj.weight"))
    head = next((row for row in rows if row.name == "lm_head.weight"), None)
    if head is None:
        return rows, multipliers
    theta = head.init_std / hidden
    told = [replace(shift(row, theta), multiplier=1.0) if row is head else row for row in rows]
    return told, multipliers | {"logits": multipliers["logits"] * theta}


def init_config(rows: list[Planned]) -> dict[str, Any]:
    """Its three stds; UserError where the plan has others."""
    named = {
        kind: row.init_std
        for kind, row in by_name(rows, {k: k for k in NAMES}).items()
        if row.init_std
    }
    last = {std for kind, std in named.items() if kind.endswith(LASTS)}
    hidden = {
        std for kind, std in named.items() if not kind.endswith((*LASTS, "embed_tokens.weight"))
    }
    for what, found in (("a branch's last matrices", last), ("the other matrices", hidden)):
        if max(found) > min(found) * (1 + 1e-9):
            raise UserError(
                f"format 'llm_foundry' has one init std for {what}, but the plan has {sorted(found)}: emit 'pytorch'"
            )
    return {
        "name": "baseline_", "init_std": min(hidden), "emb_init_std": named["model.embed_tokens.weight"],
        "init_div_is_residual": min(hidden) / min(last),
    }  # fmt: skip


def shape(transfer: Transfer, model: Transformer, multipliers: dict[str, float]) -> dict[str, Any]:
    """Keys of MPTConfig but for the init."""
    attention: dict[str, Any] = {
        "attn_type": "grouped_query_attention",
        "kv_n_heads": model.kv_heads or model.heads,
        "fused_qkv": False,
    }
    if abs(multipliers["attention"] * model.head_dim**0.5 - 1) > 1e-12:
        attention["softmax_scale"] = multipliers["attention"]
    scale = {"logit_scale": multipliers["logits"]} if abs(multipliers["logits"] - 1) > 1e-12 else {}
    return {
        "name": "mpt_causal_lm", "d_model": model.width, "n_heads": model.heads, "n_layers": model.depth,
        "max_seq_len": transfer.target.data.seq_len, "vocab_size": transfer.vocab_size, "no_bias": True, "norm_type": "rmsnorm",
        "norm_eps": model.norm_eps, "learned_pos_emb": False, "tie_word_embeddings": model.tied, **scale,
        "attn_config": attention | {"rope": True, "rope_impl": "hf", "rope_theta": model.rope_theta},
        "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": model.ffn_width, "ffn_act_fn": {"name": "silu"}},
    }  # fmt: skip


def optimizer(target: Recipe, rows: list[Planned]) -> dict[str, Any]:
    """`decoupled_adamw`; the group of the last norm is the rest, which no pattern takes."""
    told = [
        {
            "param_str_match": "|".join(g["patterns"]),
            "lr": g["lr"],
            "weight_decay": g["lr"] * g["weight_decay"],
            "eps": g["eps"],
        }
        for g in named_groups(rows, NAMES)
    ]
    rest = next(group for group in told if NAMES["model.norm.weight"] in group["param_str_match"])
    base = {key: value for key, value in rest.items() if key != "param_str_match"}
    return {
        "name": "decoupled_adamw", **base, "betas": [target.optimizer.beta1, target.optimizer.beta2],
        "param_groups": [group for group in told if group is not rest],
    }  # fmt: skip


def schedule(target: Recipe) -> dict[str, Any]:
    """Composer's, which multiply each group's own peak."""
    s = resolved(target.schedule, target.budget)
    warmup = {"t_warmup": f"{round(s.warmup * target.budget.steps)}ba"}
    if s.kind == "constant":
        return {"name": "constant_with_warmup"} | warmup
    name = {"cosine": "cosine_with_warmup", "linear": "linear_decay_with_warmup"}[s.kind]
    return {"name": name} | warmup | {"alpha_f": s.floor}


def config(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """Keys of its TrainConfig that the plan says something about."""
    model, t = as_llama(transfer.target.model, "LLM-Foundry MPT"), transfer.target
    clipping = {"clipping_type": "norm", "clipping_threshold": t.optimizer.clip}
    return {
        "max_seq_len": t.data.seq_len, "global_train_batch_size": t.budget.batch_tokens // t.data.seq_len, "max_duration": f"{t.budget.steps}ba",
        "model": shape(transfer, model, multipliers) | {"init_config": init_config(rows)},
        "optimizer": optimizer(t, rows), "scheduler": schedule(t),
        "algorithms": {"gradient_clipping": clipping},
    }  # fmt: skip


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`llm_foundry.yaml`, and `param_groups.json` with what it cannot hold and the evidence."""
    as_llama(transfer.target.model, "LLM-Foundry MPT")
    carried(transfer.target, "llm_foundry", kinds=("constant", "linear", "cosine"))
    rows, multipliers = rewritten(transfer)
    return written(folder, {
        "llm_foundry.yaml": yaml.safe_dump(config(transfer, rows, multipliers), sort_keys=False, width=200),
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT, multipliers), indent=1) + "\n",
    })  # fmt: skip
