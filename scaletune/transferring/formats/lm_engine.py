"""lm-engine at 4a791626: a training YAML with every multiplier of a Granite, one init std, and a loader for the groups.

Its own `params_group_method: mup` divides the hidden lr by m_width and leaves weight decay and eps: `install` puts the plan's groups in the
place of its default ones. m_width divides the logits, and with `init_method: normal` it does nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from scaletune.recipe import Recipe, resolved
from scaletune.rules import Planned
from scaletune.transferring import Transfer, one_std
from scaletune.transferring.formats.granite import as_llama, whole_theta, written
from scaletune.transferring.param_groups import CLIPPED, carried, merged, named_groups, param_groups

NAMES = {
    "model.embed_tokens.weight": r"transformer\.wte\.weight$", "lm_head.weight": r"\blm_head\.weight$",
    "model.norm.weight": r"transformer\.ln_f\.weight$", "input_layernorm.weight": r"\.ln_1\.weight$",
    "post_attention_layernorm.weight": r"\.ln_2\.weight$",
    **{f"self_attn.{kind}_proj.weight": r"sequence_mixer\.c_attn\.weight$" for kind in "qkv"},
    "self_attn.o_proj.weight": r"sequence_mixer\.c_proj\.weight$",
    **{f"mlp.{kind}_proj.weight": r"mlp_block\.c_fc\.weight$" for kind in ("gate", "up")},
    "mlp.down_proj.weight": r"mlp_block\.c_proj\.weight$",
}  # fmt: skip
CANNOT = [
    "learning rate, weight decay and eps of each tensor: scaletune_lm_engine.py, whose `install` is called before the training script",
    "pipeline stages: a stage without embedding or head is refused by that loader", CLIPPED,
    "data, tokenizer, saving and precision: add them to the YAML, and the tokenizer's bos, eos and pad ids, which are 0 here as in its examples",
    "micro_batch_size counts sequences a process, so divide it by processes and accumulation steps",
    "half a step: warmup counts whole steps, where the plan's schedule is read in the middle of each",
]  # fmt: skip

MODULE = '''"""Param groups for lm-engine at 4a791626, written by scaletune: the config is lm_engine.yml.

    python -c "import runpy, scaletune_lm_engine; scaletune_lm_engine.install(); runpy.run_module('lm_engine.pretrain', run_name='__main__')" ...
"""

import re

from lm_engine.optimization import params_group

GROUPS = {groups}


def make_groups(model, optimizer_class_args):
    """lm-engine's own list of groups; each parameter must match one pattern, and each pattern a parameter."""
    found, unused = [{{}} for _ in GROUPS], {{pattern for patterns, _ in GROUPS for pattern in patterns}}
    for name, parameter in model.named_parameters():
        hits = [(i, pattern) for i, (patterns, _) in enumerate(GROUPS) for pattern in patterns if re.search(pattern, name)]
        if len(hits) != 1:
            raise ValueError(f"one pattern must match every parameter, but {{name}} is matched by {{[pattern for _, pattern in hits]}}")
        found[hits[0][0]][name] = parameter
        unused.discard(hits[0][1])
    if unused:
        raise ValueError(f"every pattern must match a parameter, but these match none: {{sorted(unused)}}")
    return params_group._ParamsGroupsList(
        params_groups=[
            params_group._ParamsGroup(name=f"scaletune_{{i}}", parameter_name_map=each, params_group_kwargs=dict(GROUPS[i][1]))
            for i, each in enumerate(found)
        ]
    )


def install():
    """Put these groups in the place of the default ones, which `params_group_method: null` asks for."""
    params_group._PARAM_GROUPS[None] = make_groups
'''


def schedule(target: Recipe) -> dict[str, Any]:
    """`lr_scheduler_args`: a LambdaLR, which multiplies each group's own peak; WSD is its linear decay after constant steps."""
    s, steps = resolved(target.schedule, target.budget), target.budget.steps
    warmup = round(s.warmup * steps)
    decay = {"constant": 0, "wsd": round(s.decay * steps)}.get(s.kind, steps - warmup)
    style = "linear" if s.kind == "wsd" else s.kind
    return {
        "lr_decay_style": style, "num_warmup_steps": warmup, "num_constant_steps": steps - warmup - decay, "num_decay_steps": decay,
        "lr_decay_factor": s.floor,
    }  # fmt: skip


def pretrained_config(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """All keys of its `gpt_base` config, as its own files spell them out; a multiplier of one is null."""
    model = as_llama(transfer.target.model, "lm-engine gpt_base")
    multiplied = {
        "m_emb": multipliers["embedding"],
        "m_width": 1 / multipliers["logits"],
        "m_residual": multipliers["residual"],
    }
    attention = {
        "sequence_mixer_type": "softmax_attention", "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads or model.heads,
        "attention_multiplier": multipliers["attention"], "attention_multiplier_method": None, "softmax_dropout": 0, "dropout": 0,
        "add_bias": False, "head_dim": None, "attention_gate": False, "exclusive_self_attention": False, "sliding_window": None,
    }  # fmt: skip
    mlp = {
        "mlp_type": "MLP",
        "activation_function": "swiglu",
        "intermediate_size": model.ffn_width,
        "add_bias": False,
        "dropout": 0,
    }
    return {
        "model_type": "gpt_base", "vocab_size": transfer.vocab_size, "max_position_embeddings": transfer.target.data.seq_len,
        "hidden_size": model.width, "num_layers": model.depth, "normalization_function": "rmsnorm", "layer_norm_epsilon": model.norm_eps,
        "embedding_dropout": 0, "tie_word_embeddings": model.tied, "position_embedding_type": "rope", "rope_theta": whole_theta(model, "lm-engine gpt_base"),
        "initializer_range": next(row.init_std for row in rows if row.role == "hid"), "init_method": "normal",
        "embedding_init_method": "normal", "use_depth_scaled_init": False, "rope_scaling": None, "rope_dim": None, "use_cache": True,
        "router_aux_loss_coef": 0.001, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        **{key: None if abs(value - 1) < 1e-12 else value for key, value in multiplied.items()},
        "sequence_mixer_blocks": [dict(attention) for _ in range(model.depth)], "mlp_blocks": [dict(mlp) for _ in range(model.depth)],
    }  # fmt: skip


def config(
    transfer: Transfer, rows: list[Planned], multipliers: dict[str, float]
) -> dict[str, Any]:
    """Sections of its training arguments that the plan says something about."""
    t, o = transfer.target, transfer.target.optimizer
    return {
        "model_args": {"pretrained_config": pretrained_config(transfer, rows, multipliers)},
        "tuning_args": {"tuning_method": "pretraining"},
        "training_parameters": {
            "num_training_steps": t.budget.steps, "micro_batch_size": t.budget.batch_tokens // t.data.seq_len, "gradient_accumulation_steps": 1,
            "gradient_clipping": o.clip,
        },
        "optimizer_args": {
            "class_name": "TorchAdamW", "params_group_method": None,
            "class_args": {"lr": o.lr, "weight_decay": o.weight_decay, "betas": [o.beta1, o.beta2], "eps": o.eps},
        },
        "lr_scheduler_args": schedule(t),
    }  # fmt: skip


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`lm_engine.yml`, `scaletune_lm_engine.py`, and `param_groups.json` with what they cannot hold and the evidence."""
    as_llama(transfer.target.model, "lm-engine gpt_base")
    carried(transfer.target, "lm_engine")
    rows, multipliers = one_std(transfer)
    rows, said = merged(rows, NAMES)
    groups = [(group.pop("patterns"), group) for group in named_groups(rows, NAMES)]
    return written(folder, {
        "lm_engine.yml": yaml.safe_dump(config(transfer, rows, multipliers), sort_keys=False, width=200),
        "scaletune_lm_engine.py": MODULE.format(groups="[\n" + "".join(f"    {group!r},\n" for group in groups) + "]"),
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT + said, multipliers), indent=1) + "\n",
    })  # fmt: skip
