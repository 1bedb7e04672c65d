"""Writes a training YAML of an MPT for LLM-Foundry 0.22.0.

The YAML holds the whole plan: groups by name patterns, softmax and logits scales, four init stds.
The residual and embedding multipliers are folded into the weights. The head gets the hidden
matrices' init std, which `logit_scale` compensates by the same exact shift. LLM-Foundry's AdamW
shrinks weights by lr / peak * weight_decay per step, so its `weight_decay` is lr * weight_decay of
the plan. It ignores a pattern that matches nothing, so the tests check these patterns against MPT's
own names.
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
    "model.embed_tokens.weight": r"\bwte\.weight$",
    "lm_head.weight": r"\blm_head\.weight$",
    "model.norm.weight": r"\bnorm_f\.weight$",
    "input_layernorm.weight": r"\bnorm_1\.weight$",
    "post_attention_layernorm.weight": r"\bnorm_2\.weight$",
    "self_attn.q_proj.weight": r"attn\.Wq\.weight$",
    "self_attn.k_proj.weight": r"attn\.Wk\.weight$",
    "self_attn.v_proj.weight": r"attn\.Wv\.weight$",
    "self_attn.o_proj.weight": r"attn\.out_proj\.weight$",
    "mlp.gate_proj.weight": r"ffn\.gate_proj\.weight$",
    "mlp.up_proj.weight": r"ffn\.up_proj\.weight$",
    "mlp.down_proj.weight": r"ffn\.down_proj\.weight$",
}
BRANCH_OUTPUTS = ("o_proj.weight", "down_proj.weight")
"""Matrices whose init std MPT divides by `init_div_is_residual`."""

CANNOT = [
    f"embedding and residual multipliers: {EXACT}",
    CLIPPED,
    "data, tokenizer, sharding and evaluation: add them to the YAML; the vocabulary must be the"
    " tokenizer's",
    HALF_STEP,
]


def rewrite_plan(transfer: Transfer) -> tuple[list[TensorPlan], dict[str, float]]:
    """Rows and multipliers as MPT holds them: an untied head has the hidden matrices' init std."""
    rows, multipliers = fold_except(transfer, ("attention", "logits"))
    hidden = next(row.init_std for row in rows if row.name.endswith("v_proj.weight"))
    head = next((row for row in rows if row.name == "lm_head.weight"), None)
    if head is None:
        return rows, multipliers
    theta = head.init_std / hidden
    rows = [replace(shift(row, theta), multiplier=1.0) if row is head else row for row in rows]
    return rows, multipliers | {"logits": multipliers["logits"] * theta}


def _one_std(stds: set[float], what: str) -> float:
    if max(stds) > min(stds) * (1 + 1e-9):
        raise UserError(
            f"format 'llm_foundry' has one init std for {what},"
            f" but the plan has {sorted(stds)}: emit 'pytorch'"
        )
    return min(stds)


def init_config(rows: list[TensorPlan]) -> dict[str, Any]:
    """MPT's three stds: embedding, last matrices of a branch, other matrices."""
    by_kind = rows_by_name(rows, {k: k for k in NAMES})
    stds = {kind: row.init_std for kind, row in by_kind.items() if row.init_std}
    embedding = stds.pop("model.embed_tokens.weight")
    outputs = {std for kind, std in stds.items() if kind.endswith(BRANCH_OUTPUTS)}
    others = {std for kind, std in stds.items() if not kind.endswith(BRANCH_OUTPUTS)}
    output = _one_std(outputs, "a branch's last matrices")
    other = _one_std(others, "the other matrices")
    return {
        "name": "baseline_",
        "init_std": other,
        "emb_init_std": embedding,
        "init_div_is_residual": other / output,
    }


def shape(
    transfer: Transfer, model: TransformerConfig, multipliers: dict[str, float]
) -> dict[str, Any]:
    """Keys of MPTConfig without the init."""
    attention: dict[str, Any] = {
        "attn_type": "grouped_query_attention",
        "kv_n_heads": model.kv_heads or model.heads,
        "fused_qkv": False,
    }
    if abs(multipliers["attention"] * model.head_dim**0.5 - 1) > 1e-12:
        attention["softmax_scale"] = multipliers["attention"]
    attention |= {"rope": True, "rope_impl": "hf", "rope_theta": model.rope_theta}
    scale = {"logit_scale": multipliers["logits"]} if abs(multipliers["logits"] - 1) > 1e-12 else {}
    ffn = {"ffn_type": "mptglu", "ffn_hidden_size": model.ffn_width}
    return {
        "name": "mpt_causal_lm",
        "d_model": model.width,
        "n_heads": model.heads,
        "n_layers": model.depth,
        "max_seq_len": transfer.target.data.seq_len,
        "vocab_size": transfer.vocab_size,
        "no_bias": True,
        "norm_type": "rmsnorm",
        "norm_eps": model.norm_eps,
        "learned_pos_emb": False,
        "tie_word_embeddings": model.tied,
        **scale,
        "attn_config": attention,
        "ffn_config": ffn | {"ffn_act_fn": {"name": "silu"}},
    }


def optimizer(target: Recipe, rows: list[TensorPlan]) -> dict[str, Any]:
    """`decoupled_adamw`; the group with the final norm gives the defaults for unmatched tensors."""
    groups = [
        {
            "param_str_match": "|".join(g["patterns"]),
            "lr": g["lr"],
            "weight_decay": g["lr"] * g["weight_decay"],
            "eps": g["eps"],
        }
        for g in named_groups(rows, NAMES)
    ]
    rest = next(group for group in groups if NAMES["model.norm.weight"] in group["param_str_match"])
    return {
        "name": "decoupled_adamw",
        **{key: value for key, value in rest.items() if key != "param_str_match"},
        "betas": [target.optimizer.beta1, target.optimizer.beta2],
        "param_groups": [group for group in groups if group is not rest],
    }


def schedule(target: Recipe) -> dict[str, Any]:
    """A scheduler of Composer, which multiplies each group's own peak lr."""
    s = resolve_schedule(target.schedule, target.budget)
    warmup = {"t_warmup": f"{round(s.warmup * target.budget.steps)}ba"}
    if s.kind == "constant":
        return {"name": "constant_with_warmup"} | warmup
    name = {"cosine": "cosine_with_warmup", "linear": "linear_decay_with_warmup"}[s.kind]
    return {"name": name} | warmup | {"alpha_f": s.floor}


def config(
    transfer: Transfer, rows: list[TensorPlan], multipliers: dict[str, float]
) -> dict[str, Any]:
    """The keys of TrainConfig that the plan determines."""
    model, t = require_llama(transfer.target.model, "LLM-Foundry MPT"), transfer.target
    clipping = {"clipping_type": "norm", "clipping_threshold": t.optimizer.clip}
    return {
        "max_seq_len": t.data.seq_len,
        "global_train_batch_size": t.budget.batch_tokens // t.data.seq_len,
        "max_duration": f"{t.budget.steps}ba",
        "model": shape(transfer, model, multipliers) | {"init_config": init_config(rows)},
        "optimizer": optimizer(t, rows),
        "scheduler": schedule(t),
        "algorithms": {"gradient_clipping": clipping},
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes llm_foundry.yaml, and param_groups.json with what it cannot hold and the evidence."""
    require_llama(transfer.target.model, "LLM-Foundry MPT")
    require_supported(transfer.target, "llm_foundry", kinds=("constant", "linear", "cosine"))
    rows, multipliers = rewrite_plan(transfer)
    content = config(transfer, rows, multipliers)
    groups = param_groups(transfer, rows, CANNOT, multipliers)
    texts = {
        "llm_foundry.yaml": yaml.safe_dump(content, sort_keys=False, width=200),
        "param_groups.json": json.dumps(groups, indent=1) + "\n",
    }
    return write_files(folder, texts)
