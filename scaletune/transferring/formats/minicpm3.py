"""Writes a MiniCPM3 config.json (Hugging Face transformers). Needs `force`.

The ranks of its multi-head latent attention (arXiv:2405.04434) grow with width here. Checked in
transformers 5.23.0: branches are multiplied by scale_depth / sqrt(layers), the head's input by
dim_model_base / hidden_size, both integers. The softmax scale is fixed, so its multiplier is folded
into the last query matrix. See `untested_archs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from scaletune.errors import UserError
from scaletune.rules import Tensor, TensorPlan, shift
from scaletune.transferring.formats import untested_archs
from scaletune.transferring.target import Transfer
from scaletune.zoo import TransformerConfig

QUERIES, KEYS = 4, 8
"""Width over the rank of queries, and of keys and values; MiniCPM3-4B has 2560/768 and 2560/256."""


def layer(name: str, model: TransformerConfig) -> Iterator[Tensor]:
    """The tensors of one layer.

    Half of each head has rotary positions, which all heads share for a key. The gains of a latent
    are a vector.
    """
    attention, width = f"{name}.self_attn", model.width
    queries, keys, rotary = width // QUERIES, width // KEYS, model.head_dim // 2
    per_head = model.head_dim - rotary + model.head_dim
    key_rows = keys + rotary
    hidden, gain = untested_archs.hidden_matrix, untested_archs.gain
    yield hidden(f"{attention}.q_a_proj", queries, width)
    yield gain(f"{attention}.q_a_layernorm.weight", queries)
    yield hidden(f"{attention}.q_b_proj", width, queries)
    yield hidden(f"{attention}.kv_a_proj_with_mqa", key_rows, width, growing=keys)
    yield gain(f"{attention}.kv_a_layernorm.weight", keys)
    yield hidden(f"{attention}.kv_b_proj", model.heads * per_head, keys)
    yield hidden(f"{attention}.o_proj", width, width)
    yield from untested_archs.mlp(f"{name}.mlp", model)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield gain(f"{name}.{norm}.weight", width)


MINICPM3 = untested_archs.UntestedArch(
    "MiniCPM3",
    "minicpm3",
    "multi-head latent attention",
    layer,
    "model.norm.weight",
    multiple_of=8,
    cannot=(
        f"latent ranks: q_lora_rank is hidden_size / {QUERIES} and kv_lora_rank is hidden_size /"
        f" {KEYS}; ranks that do not grow with width would need other scaling rules",
        "softmax multiplier: the scale is fixed, so the multiplier is folded into q_b_proj (exact"
        " under AdamW, except for gradient clipping)",
    ),
)


def readout(transfer: Transfer, rows: list[TensorPlan]) -> tuple[list[TensorPlan], int]:
    """Returns the rows and dim_model_base.

    The logits multiplier is dim_model_base / width if that is exact, else it is folded into the
    head.
    """
    width = transfer.target.model.width
    base = transfer.multipliers["logits"] * width
    if abs(round(base) - base) < 1e-9 * base:
        return rows, round(base)
    head = "lm_head.weight"
    if not any(row.name == head for row in rows):
        raise UserError(
            "MiniCPM3 multiplies logits by dim_model_base / hidden_size, both integers, but the"
            f" tied head needs {base:.6g} / {width}: set model.tied = false or another"
            " logits_multiplier"
        )
    theta = width / base
    return [shift(row, theta, row.family) if row.name == head else row for row in rows], width


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes config.json, param_groups.json and loader.py."""
    rows = untested_archs.plan_tensors(MINICPM3, transfer)
    model, m = transfer.target.model, transfer.multipliers
    assert isinstance(model, TransformerConfig)
    if model.kv_heads not in (None, model.heads):
        raise UserError(
            "MiniCPM3 needs as many key-value heads as heads,"
            f" but got kv_heads={model.kv_heads}, heads={model.heads}"
        )
    softmax = m["attention"] * model.head_dim**0.5
    rows = [
        shift(replace(row, multiplier=softmax), 1 / softmax, row.family)
        if "q_b_proj" in row.name
        else row
        for row in rows
    ]
    rows, base = readout(transfer, rows)
    own = {
        "q_lora_rank": model.width // QUERIES,
        "kv_lora_rank": model.width // KEYS,
        "qk_rope_head_dim": model.head_dim // 2,
        "qk_nope_head_dim": model.head_dim - model.head_dim // 2,
        "v_head_dim": model.head_dim,
        "scale_emb": m["embedding"],
        "scale_depth": m["residual"] * model.depth**0.5,
        "dim_model_base": base,
    }
    return untested_archs.emit(MINICPM3, transfer, rows, own, folder)
