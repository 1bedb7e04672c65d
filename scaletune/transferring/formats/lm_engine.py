"""Writes a training YAML for lm-engine (4a791626), and a module that installs the param groups.

The YAML has all multipliers of a Granite and one init std. lm-engine's own `params_group_method:
mup` divides the hidden lr by m_width but does not scale weight decay and eps, so `install` replaces
its default groups by the plan's. m_width divides the logits; with `init_method: normal` it has no
other effect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from scaletune.recipe import Recipe, resolve_schedule
from scaletune.rules import TensorPlan
from scaletune.transferring.formats.granite import integer_rope_theta, require_llama, write_files
from scaletune.transferring.param_groups import (
    CLIPPED,
    HALF_STEP,
    named_groups,
    param_groups,
    require_supported,
    share_eps,
)
from scaletune.transferring.target import Transfer, one_std

NAMES = {
    "model.embed_tokens.weight": r"transformer\.wte\.weight$",
    "lm_head.weight": r"\blm_head\.weight$",
    "model.norm.weight": r"transformer\.ln_f\.weight$",
    "input_layernorm.weight": r"\.ln_1\.weight$",
    "post_attention_layernorm.weight": r"\.ln_2\.weight$",
    **{f"self_attn.{kind}_proj.weight": r"sequence_mixer\.c_attn\.weight$" for kind in "qkv"},
    "self_attn.o_proj.weight": r"sequence_mixer\.c_proj\.weight$",
    **{f"mlp.{kind}_proj.weight": r"mlp_block\.c_fc\.weight$" for kind in ("gate", "up")},
    "mlp.down_proj.weight": r"mlp_block\.c_proj\.weight$",
}
CANNOT = [
    "learning rate, weight decay and eps per tensor: scaletune_lm_engine.py sets them; call its"
    " `install` before the training script",
    "pipeline stages: scaletune_lm_engine.py refuses a stage without embedding or head",
    CLIPPED,
    "data, tokenizer, saving and precision: add them to the YAML, and the tokenizer's bos, eos and"
    " pad ids, which are 0 here as in lm-engine's examples",
    "micro_batch_size counts sequences per process: divide it by processes and accumulation steps",
    HALF_STEP,
]

MODULE = '''\
"""Param groups for lm-engine at 4a791626, written by scaletune. The config is lm_engine.yml.

Start training from a script with these lines:

    import runpy, scaletune_lm_engine
    scaletune_lm_engine.install()
    runpy.run_module("lm_engine.pretrain", run_name="__main__")
"""

import re

from lm_engine.optimization import params_group

GROUPS = {groups}


def make_groups(model, optimizer_class_args):
    """Returns lm-engine's list of groups.

    Each parameter must match exactly one pattern, and each pattern a parameter.
    """
    names = [{{}} for _ in GROUPS]
    unused = {{pattern for patterns, _ in GROUPS for pattern in patterns}}
    for name, parameter in model.named_parameters():
        pairs = [(i, p) for i, (patterns, _) in enumerate(GROUPS) for p in patterns]
        hits = [(i, p) for i, p in pairs if re.search(p, name)]
        if len(hits) != 1:
            matches = [p for _, p in hits]
            raise ValueError(f"one pattern must match {{name}}, but it matches {{matches}}")
        names[hits[0][0]][name] = parameter
        unused.discard(hits[0][1])
    if unused:
        raise ValueError(f"every pattern must match a parameter, but not these: {{sorted(unused)}}")
    return params_group._ParamsGroupsList(
        params_groups=[
            params_group._ParamsGroup(
                name=f"scaletune_{{i}}",
                parameter_name_map=each,
                params_group_kwargs=dict(GROUPS[i][1]),
            )
            for i, each in enumerate(names)
        ]
    )


def install():
    """Replaces lm-engine's default groups, which `params_group_method: null` selects."""
    params_group._PARAM_GROUPS[None] = make_groups
'''


def schedule(target: Recipe) -> dict[str, Any]:
    """`lr_scheduler_args` of a LambdaLR, which multiplies each group's own peak lr.

    WSD is its linear decay after constant steps.
    """
    s, steps = resolve_schedule(target.schedule, target.budget), target.budget.steps
    warmup = round(s.warmup * steps)
    decay = {"constant": 0, "wsd": round(s.decay * steps)}.get(s.kind, steps - warmup)
    return {
        "lr_decay_style": "linear" if s.kind == "wsd" else s.kind,
        "num_warmup_steps": warmup,
        "num_constant_steps": steps - warmup - decay,
        "num_decay_steps": decay,
        "lr_decay_factor": s.floor,
    }


def pretrained_config(
    transfer: Transfer, rows: list[TensorPlan], multipliers: dict[str, float]
) -> dict[str, Any]:
    """All keys of a `gpt_base` config, as lm-engine's own files list them.

    A multiplier of one is null.
    """
    model = require_llama(transfer.target.model, "lm-engine gpt_base")
    scales = {
        "m_emb": multipliers["embedding"],
        "m_width": 1 / multipliers["logits"],
        "m_residual": multipliers["residual"],
    }
    attention = {
        "sequence_mixer_type": "softmax_attention",
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "attention_multiplier": multipliers["attention"],
        "attention_multiplier_method": None,
        "softmax_dropout": 0,
        "dropout": 0,
        "add_bias": False,
        "head_dim": None,
        "attention_gate": False,
        "exclusive_self_attention": False,
        "sliding_window": None,
    }
    mlp = {
        "mlp_type": "MLP",
        "activation_function": "swiglu",
        "intermediate_size": model.ffn_width,
        "add_bias": False,
        "dropout": 0,
    }
    return {
        "model_type": "gpt_base",
        "vocab_size": transfer.vocab_size,
        "max_position_embeddings": transfer.target.data.seq_len,
        "hidden_size": model.width,
        "num_layers": model.depth,
        "normalization_function": "rmsnorm",
        "layer_norm_epsilon": model.norm_eps,
        "embedding_dropout": 0,
        "tie_word_embeddings": model.tied,
        "position_embedding_type": "rope",
        "rope_theta": integer_rope_theta(model, "lm-engine gpt_base"),
        "initializer_range": next(row.init_std for row in rows if row.role == "hid"),
        "init_method": "normal",
        "embedding_init_method": "normal",
        "use_depth_scaled_init": False,
        "rope_scaling": None,
        "rope_dim": None,
        "use_cache": True,
        "router_aux_loss_coef": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **{key: None if abs(value - 1) < 1e-12 else value for key, value in scales.items()},
        "sequence_mixer_blocks": [dict(attention) for _ in range(model.depth)],
        "mlp_blocks": [dict(mlp) for _ in range(model.depth)],
    }


def config(
    transfer: Transfer, rows: list[TensorPlan], multipliers: dict[str, float]
) -> dict[str, Any]:
    """The sections of the training arguments that the plan determines."""
    t, o = transfer.target, transfer.target.optimizer
    betas = [o.beta1, o.beta2]
    return {
        "model_args": {"pretrained_config": pretrained_config(transfer, rows, multipliers)},
        "tuning_args": {"tuning_method": "pretraining"},
        "training_parameters": {
            "num_training_steps": t.budget.steps,
            "micro_batch_size": t.budget.batch_tokens // t.data.seq_len,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": o.clip,
        },
        "optimizer_args": {
            "class_name": "TorchAdamW",
            "params_group_method": None,
            "class_args": {
                "lr": o.lr,
                "weight_decay": o.weight_decay,
                "betas": betas,
                "eps": o.eps,
            },
        },
        "lr_scheduler_args": schedule(t),
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes lm_engine.yml, scaletune_lm_engine.py, and param_groups.json with the evidence."""
    require_llama(transfer.target.model, "lm-engine gpt_base")
    require_supported(transfer.target, "lm_engine")
    rows, multipliers = one_std(transfer)
    rows, changed_eps = share_eps(rows, NAMES)
    groups = [(group.pop("patterns"), group) for group in named_groups(rows, NAMES)]
    listed = "[\n" + "".join(f"    {group!r},\n" for group in groups) + "]"
    content = config(transfer, rows, multipliers)
    beside = param_groups(transfer, rows, CANNOT + changed_eps, multipliers)
    texts = {
        "lm_engine.yml": yaml.safe_dump(content, sort_keys=False, width=200),
        "scaletune_lm_engine.py": MODULE.format(groups=listed),
        "param_groups.json": json.dumps(beside, indent=1) + "\n",
    }
    return write_files(folder, texts)
