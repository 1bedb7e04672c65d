"""nanoGPT-mup (branch completep, 39044043): a Python file of settings for its configurator; muP, groups and schedule are its own.

Depth scaling is always switched on, at a depth multiplier of 1 where the plan has none: without it weight decay would not be scaled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import Recipe, resolved
from scaletune.transferring import Transfer
from scaletune.transferring.formats.granite import written
from scaletune.transferring.param_groups import carried
from scaletune.zoo import Transformer

IS = {
    "norm": "layer",
    "mlp": "gelu",
    "positions": "learned",
    "tied": True,
    "ffn_ratio": 4.0,
    "qk_norm": False,
    "norm_eps": 1e-5,
}
CANNOT = [
    "logits at generation: its model multiplies them by mup_output_alpha / mup_width_multiplier in training alone",
    "batch size in tokens: batch_size counts sequences a step and process, so divide by the number of processes",
    "half a step: warmup counts whole steps, where the plan's schedule is read in the middle of each",
]


def _require(transfer: Transfer) -> Transformer:
    """The model; UserError with the first thing that nanoGPT-mup is not."""
    t, p = transfer.target, transfer.target.parametrization
    model = t.model
    if not isinstance(model, Transformer):
        raise UserError(
            f"nanoGPT-mup must be of a 'transformer', but got `model.family` {model.family!r}"
        )
    for key, value in IS.items():
        if getattr(model, key) != value:
            raise UserError(
                f"nanoGPT-mup has `model.{key}` {value!r}, but the target has {getattr(model, key)!r}"
            )
    form = p.form if p.form in ("mup", "mup_t8") else "mup_t8"
    for key, wanted in {
        "form": form,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "init_gain": None,
    }.items():
        if getattr(p, key) != wanted:
            raise UserError(
                f"nanoGPT-mup has `parametrization.{key}` {wanted!r}, but the target has {getattr(p, key)!r}"
            )
    if (
        t.optimizer.decay != "torch"
        or model.kv_heads not in (None, model.heads)
        or model.max_positions != t.data.seq_len
    ):
        raise UserError(
            "nanoGPT-mup has decay 'torch', as many key-value heads as query heads and `max_positions == seq_len`; the target has not"
        )
    return model


def _schedule(target: Recipe) -> dict[str, Any]:
    """Cosine or none: `lr_scale` of each group multiplies what its get_lr gives."""
    s, o, steps = resolved(target.schedule, target.budget), target.optimizer, target.budget.steps
    return {
        "learning_rate": o.lr, "decay_lr": True, "warmup_iters": round(s.warmup * steps), "max_iters": steps, "lr_decay_iters": steps,
        "min_lr": o.lr * s.floor,
    }  # fmt: skip


def settings(transfer: Transfer) -> dict[str, Any]:
    """The settings by nanoGPT-mup's names."""
    model, t = _require(transfer), transfer.target
    p, o = t.parametrization, t.optimizer
    return {
        "n_layer": model.depth, "n_head": model.heads, "n_embd": model.width, "block_size": t.data.seq_len, "bias": model.biases,
        "dropout": 0.0, "init_std": p.init_std, "mup_enabled": True, "mup_width_multiplier": model.width / p.base_width,
        "mup_input_alpha": p.embedding_multiplier, "mup_output_alpha": p.logits_multiplier, "mup_disable_attention_scaling": True,
        "mup_disable_hidden_lr_scaling": False, "depth_alpha_enabled": True,
        "depth_multiplier": model.depth / (p.base_depth or model.depth) if p.depth_alpha else 1.0,
        "depth_alpha_exp": p.depth_alpha or 1.0, **_schedule(t), "weight_decay": o.weight_decay, "beta1": o.beta1, "beta2": o.beta2,
        "adam_eps": o.eps, "grad_clip": o.clip, "batch_size": t.budget.batch_tokens // t.data.seq_len, "gradient_accumulation_steps": 1,
    }  # fmt: skip


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`scaletune_nanogpt_mup.py`."""
    carried(transfer.target, "nanogpt_mup", kinds=("cosine",))
    e = transfer.evidence
    head = [
        f"For nanoGPT-mup at 39044043, written by scaletune {e['scaletune']} from fit {e['fit']} (law {e['law']})."
    ]
    said = [
        *head,
        *(f"Cannot hold: {line}" for line in CANNOT),
        *(f"Assumed: {line}" for line in e["assumptions"]),
    ]
    lines = [f"# {line}" for line in said] + [
        f"{key} = {value!r}" for key, value in settings(transfer).items()
    ]
    return written(folder, {"scaletune_nanogpt_mup.py": "\n".join(lines) + "\n"})
