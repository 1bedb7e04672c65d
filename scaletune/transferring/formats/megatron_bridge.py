"""Megatron-Bridge 0.3.1, on megatron-core 0.16.1: a Python module of its config objects, with groups and init by name.

These releases have no muP, but a `softmax_scale`; the other multipliers are written into the weights. Overrides by name are a config of their
own here, and initial weights a hook of the model's provider, so that nothing of the library is replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.recipe import resolved
from scaletune.transferring import Transfer
from scaletune.transferring.fold_multipliers import EXACT, without_logits
from scaletune.transferring.formats.granite import as_llama, whole_theta, written
from scaletune.transferring.formats.megatron import COMMON, module, rewritten, schedule
from scaletune.transferring.param_groups import CLIPPED, param_groups

CANNOT = [
    f"embedding, logits and residual multipliers: {EXACT}", CLIPPED,
    "data, tokenizer, parallelism and precision: put them into the ConfigContainer",
    "half a step: warmup counts whole iterations, where the plan's schedule is read in the middle of each",
]  # fmt: skip
MODULE = (
    '''"""Configs for Megatron-Bridge 0.3.1, written by scaletune.

    ConfigContainer(
        model=model_provider(), optimizer=OptimizerConfig(**OPTIMIZER), scheduler=SchedulerConfig(**SCHEDULER),
        optimizer_config_override_provider=Groups(), train=TrainingConfig(**TRAIN, micro_batch_size=...), ...
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
    """The model, drawn before it is wrapped."""
    provider = GPTModelProvider(activation_func=torch.nn.functional.silu, **MODEL)
    provider.register_pre_wrap_hook(lambda chunks: start(chunks) or chunks)
    return provider
'''
)


def model(transfer: Transfer, softmax_scale: float, init_std: float) -> dict[str, Any]:
    """Fields of GPTModelProvider."""
    shape, t = as_llama(transfer.target.model, "Megatron GPT"), transfer.target
    return {
        "num_layers": shape.depth, "hidden_size": shape.width, "ffn_hidden_size": shape.ffn_width, "num_attention_heads": shape.heads,
        "kv_channels": shape.head_dim, "num_query_groups": shape.kv_heads or shape.heads, "softmax_scale": softmax_scale,
        "normalization": "RMSNorm", "layernorm_epsilon": shape.norm_eps, "gated_linear_unit": True, "add_bias_linear": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "init_method_std": init_std, "position_embedding_type": "rope",
        "rotary_base": whole_theta(shape, "Megatron GPT"), "seq_length": t.data.seq_len, "vocab_size": transfer.vocab_size,
        "share_embeddings_and_output_weights": shape.tied,
    }  # fmt: skip


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`scaletune_megatron_bridge.py`, and `param_groups.json` with what it cannot hold and the evidence."""
    rows, said, multipliers = rewritten(transfer, "megatron_bridge", ("attention",))
    without_logits(rows, multipliers["logits"], "megatron_bridge")
    t, o = transfer.target, transfer.target.optimizer
    optimizer = {
        "optimizer": "adam", "lr": o.lr, "min_lr": resolved(t.schedule, t.budget).floor * o.lr, "weight_decay": o.weight_decay,
        "adam_beta1": o.beta1, "adam_beta2": o.beta2, "adam_eps": o.eps, "clip_grad": o.clip,
    }  # fmt: skip
    train = {
        "global_batch_size": t.budget.batch_tokens // t.data.seq_len,
        "train_iters": t.budget.steps,
    }
    told = {
        "model": model(transfer, multipliers["attention"], rows[0].init_std),
        "scheduler": schedule(t),
        "train": train,
    }
    return written(folder, {
        "scaletune_megatron_bridge.py": module(MODULE, transfer, rows, optimizer=optimizer, **told),
        "param_groups.json": json.dumps(param_groups(transfer, rows, CANNOT + said, multipliers), indent=1) + "\n",
    })  # fmt: skip
