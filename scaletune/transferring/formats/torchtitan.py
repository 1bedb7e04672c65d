"""Writes a Python module of config objects for torchtitan 0.3.0.

torchtitan has groups by name patterns, an init per tensor and a schedule that multiplies each
group's peak lr. It has no forward multipliers, so they are folded into the weights; that includes
the residual multiplier of a depth rule, which goes into each branch's last matrix.
"""

from __future__ import annotations

import json
from pathlib import Path

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolve_schedule
from scaletune.transferring.fold_multipliers import EXACT, fold_all
from scaletune.transferring.formats.granite import require_llama, write_files
from scaletune.transferring.param_groups import (
    CLIPPED,
    HALF_STEP,
    SCRIPT,
    named_groups,
    param_groups,
    require_supported,
    stds,
)
from scaletune.transferring.target import Transfer

NAMES = {
    "model.embed_tokens.weight": r"tok_embeddings\.weight",
    "lm_head.weight": r"lm_head\.weight",
    "model.norm.weight": r"^norm\.weight",
    "input_layernorm.weight": r"attention_norm\.weight",
    "post_attention_layernorm.weight": r"ffn_norm\.weight",
    "self_attn.q_proj.weight": r"wq\.weight",
    "self_attn.k_proj.weight": r"wk\.weight",
    "self_attn.v_proj.weight": r"wv\.weight",
    "self_attn.o_proj.weight": r"wo\.weight",
    "mlp.gate_proj.weight": r"w1\.weight",
    "mlp.up_proj.weight": r"w3\.weight",
    "mlp.down_proj.weight": r"w2\.weight",
}
CANNOT = [
    f"forward multipliers: {EXACT}",
    SCRIPT,
    CLIPPED,
    "fused q, k and v: they are separate here, because the plan may give queries other settings",
    "pipeline stages: torchtitan needs each pattern to match in every stage, so it refuses a stage"
    " without embedding or head",
    HALF_STEP,
]

MODULE = '''"""Configs for torchtitan 0.3.0, written by scaletune.

Pass them to Trainer.Config(model_spec=..., optimizer=..., lr_scheduler=...).
"""

from functools import partial

import torch.nn as nn
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
)
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

SHAPE = {shape}
STD = {std}
GROUPS = {groups}
BETAS = {betas}
SCHEDULE = {schedule}


def init_normal(name):
    return {{"weight": partial(nn.init.normal_, std=STD[name])}}


def norm():
    return RMSNorm.Config(
        normalized_shape=SHAPE["dim"],
        eps=SHAPE["norm_eps"],
        param_init={{"weight": nn.init.ones_}},
    )


def block(attn_backend):
    dim, heads = SHAPE["dim"], SHAPE["n_heads"]
    rope = ComplexRoPE.Config(
        dim=dim // heads, max_seq_len=SHAPE["seq_len"], theta=SHAPE["rope_theta"]
    )
    attention = make_gqa_config(
        dim=dim,
        n_heads=heads,
        n_kv_heads=SHAPE["n_kv_heads"],
        fuse_qkv=False,
        rope=rope,
        inner_attention=get_attention_config(attn_backend),
        wqkv_param_init=init_normal(r"wk\\.weight"),
        wo_param_init=init_normal(r"wo\\.weight"),
    )
    attention.qkv_linear.wq.param_init = init_normal(r"wq\\.weight")
    mlp = make_ffn_config(
        dim=dim,
        hidden_dim=SHAPE["hidden_dim"],
        w1_param_init=init_normal(r"w1\\.weight"),
        w2w3_param_init=init_normal(r"w3\\.weight"),
    )
    mlp.w2.param_init = init_normal(r"w2\\.weight")
    return Llama3TransformerBlock.Config(
        attention_norm=norm(), ffn_norm=norm(), attention=attention, feed_forward=mlp
    )


def model_config(attn_backend="flex"):
    dim, vocab = SHAPE["dim"], SHAPE["vocab_size"]
    embeddings = Embedding.Config(
        num_embeddings=vocab,
        embedding_dim=dim,
        param_init=init_normal(r"tok_embeddings\\.weight"),
    )
    head = Linear.Config(
        in_features=dim, out_features=vocab, param_init=init_normal(r"lm_head\\.weight")
    )
    return Llama3Model.Config(
        dim=dim,
        vocab_size=vocab,
        norm=norm(),
        layers=[block(attn_backend) for _ in range(SHAPE["n_layers"])],
        tok_embeddings=embeddings,
        lm_head=head,
    )


def optimizer_config(implementation="fused"):
    groups = [
        ParamGroupConfig(
            pattern=p, optimizer_name="AdamW", optimizer_kwargs={{"betas": BETAS, **kwargs}}
        )
        for p, kwargs in GROUPS
    ]
    return OptimizersContainer.Config(param_groups=groups, implementation=implementation)


def lr_scheduler_config():
    return LRSchedulersContainer.Config(**SCHEDULE)
'''


def schedule(target: Recipe) -> dict[str, object]:
    """Fields of LRSchedulersContainer.Config: a LambdaLR, which multiplies each group's peak lr."""
    s = resolve_schedule(target.schedule, target.budget)
    return {
        "warmup_steps": round(s.warmup * target.budget.steps),
        "total_steps": target.budget.steps,
        "decay_ratio": {"constant": 0.0, "wsd": s.decay}.get(s.kind),
        "decay_type": "cosine" if s.kind == "cosine" else "linear",
        "min_lr_factor": s.floor,
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes scaletune_torchtitan.py, and param_groups.json with the evidence."""
    model = require_llama(transfer.target.model, "torchtitan LLaMA")
    require_supported(transfer.target, "torchtitan")
    if model.tied:
        raise UserError(
            "format 'torchtitan' initializes head and embedding separately: set model.tied = false,"
            " or emit 'granite'"
        )
    rows = fold_all(transfer, "torchtitan")
    groups = [("|".join(group.pop("patterns")), group) for group in named_groups(rows, NAMES)]
    shape = {
        "dim": model.width,
        "n_layers": model.depth,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads or model.heads,
        "hidden_dim": model.ffn_width,
        "vocab_size": transfer.vocab_size,
        "seq_len": transfer.target.data.seq_len,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
    }
    o = transfer.target.optimizer
    module = MODULE.format(
        shape=shape,
        std=stds(rows, NAMES),
        groups="[\n" + "".join(f"    {group!r},\n" for group in groups) + "]",
        betas=(o.beta1, o.beta2),
        schedule=schedule(transfer.target),
    )
    beside = json.dumps(param_groups(transfer, rows, CANNOT), indent=1) + "\n"
    return write_files(folder, {"scaletune_torchtitan.py": module, "param_groups.json": beside})
