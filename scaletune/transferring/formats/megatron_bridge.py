"""Writes a Python module of config objects for Megatron-Bridge 0.3.1 (megatron-core 0.16.1).

These releases have no muP, but a `softmax_scale`; the other multipliers are folded into the
weights. Per-name overrides are an own config class, and a hook of the model provider draws the
initial weights, so nothing in the library is replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.recipe import resolve_schedule
from scaletune.transferring.fold_multipliers import EXACT, require_no_logits_multiplier
from scaletune.transferring.formats.granite import integer_rope_theta, require_llama, write_files
from scaletune.transferring.formats.megatron import COMMON, render_module, rewrite_plan, schedule
from scaletune.transferring.param_groups import CLIPPED, HALF_STEP, param_groups
from scaletune.transferring.target import Transfer

CANNOT = [
    f"embedding, logits and residual multipliers: {EXACT}",
    CLIPPED,
    "data, tokenizer, parallelism and precision: add them to the ConfigContainer",
    HALF_STEP,
]
MODULE = (
    '''"""Configs for Megatron-Bridge 0.3.1, written by scaletune.

    ConfigContainer(
        model=model_provider(),
        optimizer=OptimizerConfig(**OPTIMIZER),
        scheduler=SchedulerConfig(**SCHEDULER),
        optimizer_config_override_provider=Groups(),
        train=TrainingConfig(**TRAIN, micro_batch_size=...),
        ...
    )
"""
'''
    + COMMON
    + '''
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import OptimizerConfigOverrideProvider

MODEL = {model}
OPTIMIZER = {optimizer}
SCHEDULER = {scheduler}
TRAIN = {train}


class Groups(OptimizerConfigOverrideProvider):
    def build_config_overrides(self, context):
        return overrides(context.model if isinstance(context.model, list) else [context.model])


def model_provider():
    """The model's provider, with a hook that draws the weights before the model is wrapped."""
    provider = GPTModelProvider(activation_func=torch.nn.functional.silu, **MODEL)
    provider.register_pre_wrap_hook(lambda chunks: start(chunks) or chunks)
    return provider
'''
)


def model(transfer: Transfer, softmax_scale: float, init_std: float) -> dict[str, Any]:
    """Fields of GPTModelProvider."""
    shape, t = require_llama(transfer.target.model, "Megatron GPT"), transfer.target
    return {
        "num_layers": shape.depth,
        "hidden_size": shape.width,
        "ffn_hidden_size": shape.ffn_width,
        "num_attention_heads": shape.heads,
        "kv_channels": shape.head_dim,
        "num_query_groups": shape.kv_heads or shape.heads,
        "softmax_scale": softmax_scale,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": init_std,
        "position_embedding_type": "rope",
        "rotary_base": integer_rope_theta(shape, "Megatron GPT"),
        "seq_length": t.data.seq_len,
        "vocab_size": transfer.vocab_size,
        "share_embeddings_and_output_weights": shape.tied,
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes scaletune_megatron_bridge.py, and param_groups.json with the evidence."""
    rows, changed_eps, multipliers = rewrite_plan(transfer, "megatron_bridge", ("attention",))
    require_no_logits_multiplier(rows, multipliers["logits"], "megatron_bridge")
    t, o = transfer.target, transfer.target.optimizer
    optimizer = {
        "optimizer": "adam",
        "lr": o.lr,
        "min_lr": resolve_schedule(t.schedule, t.budget).floor * o.lr,
        "weight_decay": o.weight_decay,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_eps": o.eps,
        "clip_grad": o.clip,
    }
    sections = {
        "model": model(transfer, multipliers["attention"], rows[0].init_std),
        "optimizer": optimizer,
        "scheduler": schedule(t),
        "train": {
            "global_batch_size": t.budget.batch_tokens // t.data.seq_len,
            "train_iters": t.budget.steps,
        },
    }
    beside = param_groups(transfer, rows, CANNOT + changed_eps, multipliers)
    texts = {
        "scaletune_megatron_bridge.py": render_module(MODULE, transfer, rows, **sections),
        "param_groups.json": json.dumps(beside, indent=1) + "\n",
    }
    return write_files(folder, texts)
