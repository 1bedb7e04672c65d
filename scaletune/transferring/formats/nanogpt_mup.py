"""Writes a settings file for nanoGPT-mup (branch completep, 39044043).

nanoGPT-mup computes muP, param groups and schedule itself. Depth scaling is always enabled, with a
depth multiplier of 1 if the plan has no depth rule: without it weight decay would not be scaled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolve_schedule
from scaletune.transferring.formats.granite import write_files
from scaletune.transferring.param_groups import HALF_STEP, require_supported
from scaletune.transferring.target import Transfer
from scaletune.zoo import TransformerConfig

REQUIRED = {
    "norm": "layer",
    "mlp": "gelu",
    "positions": "learned",
    "tied": True,
    "ffn_ratio": 4.0,
    "qk_norm": False,
    "norm_eps": 1e-5,
}
CANNOT = [
    "logits at generation: the model multiplies them by mup_output_alpha / mup_width_multiplier in"
    " training only",
    "batch size in tokens: batch_size counts sequences per step and process, so divide it by the"
    " number of processes",
    HALF_STEP,
]


def _require(section: str, config: Any, required: dict[str, Any]) -> None:
    for key, value in required.items():
        if getattr(config, key) != value:
            raise UserError(
                f"nanoGPT-mup needs `{section}.{key}` {value!r},"
                f" but the target has {getattr(config, key)!r}"
            )


def _require_target(target: Recipe) -> TransformerConfig:
    """Returns the target's model; UserError if nanoGPT-mup cannot train the target."""
    model, p = target.model, target.parametrization
    if not isinstance(model, TransformerConfig):
        raise UserError(f"nanoGPT-mup needs `model.family` 'transformer', but got {model.family!r}")
    _require("model", model, REQUIRED)
    form = p.form if p.form in ("mup", "mup_t8") else "mup_t8"
    multipliers = {"attention_multiplier": 1.0, "residual_multiplier": 1.0, "init_gain": None}
    _require("parametrization", p, {"form": form} | multipliers)
    _require("optimizer", target.optimizer, {"decay": "torch"})
    if model.kv_heads not in (None, model.heads) or model.max_positions != target.data.seq_len:
        raise UserError(
            "nanoGPT-mup needs as many key-value heads as heads and `max_positions == seq_len`, but"
            f" got kv_heads={model.kv_heads}, heads={model.heads},"
            f" max_positions={model.max_positions}, seq_len={target.data.seq_len}"
        )
    return model


def _schedule(target: Recipe) -> dict[str, Any]:
    """The cosine schedule; each group's `lr_scale` multiplies it."""
    s, o, b = resolve_schedule(target.schedule, target.budget), target.optimizer, target.budget
    return {
        "learning_rate": o.lr,
        "decay_lr": True,
        "warmup_iters": round(s.warmup * b.steps),
        "max_iters": b.steps,
        "lr_decay_iters": b.steps,
        "min_lr": o.lr * s.floor,
    }


def settings(transfer: Transfer) -> dict[str, Any]:
    """The settings by nanoGPT-mup's names."""
    t = transfer.target
    model, p, o = _require_target(t), t.parametrization, t.optimizer
    m_depth = model.depth / (p.base_depth or model.depth) if p.depth_alpha else 1.0
    return {
        "n_layer": model.depth,
        "n_head": model.heads,
        "n_embd": model.width,
        "block_size": t.data.seq_len,
        "bias": model.biases,
        "dropout": 0.0,
        "init_std": p.init_std,
        "mup_enabled": True,
        "mup_width_multiplier": model.width / p.base_width,
        "mup_input_alpha": p.embedding_multiplier,
        "mup_output_alpha": p.logits_multiplier,
        "mup_disable_attention_scaling": True,
        "mup_disable_hidden_lr_scaling": False,
        "depth_alpha_enabled": True,
        "depth_multiplier": m_depth,
        "depth_alpha_exp": p.depth_alpha or 1.0,
        **_schedule(t),
        "weight_decay": o.weight_decay,
        "beta1": o.beta1,
        "beta2": o.beta2,
        "adam_eps": o.eps,
        "grad_clip": o.clip,
        "batch_size": t.budget.batch_tokens // t.data.seq_len,
        "gradient_accumulation_steps": 1,
    }


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes scaletune_nanogpt_mup.py."""
    require_supported(transfer.target, "nanogpt_mup", kinds=("cosine",))
    e = transfer.evidence
    comments = [
        f"For nanoGPT-mup at 39044043, written by scaletune {e['scaletune']} from fit {e['fit']}"
        f" (law {e['law']}).",
        *(f"Cannot hold: {line}" for line in CANNOT),
        *(f"Assumed: {line}" for line in e["assumptions"]),
    ]
    lines = [f"# {line}" for line in comments]
    lines += [f"{key} = {value!r}" for key, value in settings(transfer).items()]
    return write_files(folder, {"scaletune_nanogpt_mup.py": "\n".join(lines) + "\n"})
