"""Hugging Face MiniCPM3: multi-head latent attention (arXiv:2405.04434), whose ranks grow with width here. See `unproven`.

Read in transformers 5.23.0: branches are multiplied by scale_depth / sqrt(layers), the readout's input by dim_model_base / hidden_size,
which is a whole number over another; the softmax's scale is fixed, so its multiplier is in the last matrix of the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from scaletune.errors import UserError
from scaletune.rules import Planned, Tensor, shift
from scaletune.transferring import Transfer
from scaletune.transferring.formats import untested_archs
from scaletune.zoo import Transformer

QUERIES, KEYS = (
    4,
    8,
)  # width over the rank of queries, and of keys and values: near MiniCPM3-4B's 2560 / 768 and 2560 / 256


def layer(name: str, model: Transformer) -> Iterator[Tensor]:
    """One layer. Half of a head is turned by its position, the same for all heads of a key; a latent's gains are a vector."""
    queries, keys, turned, attention = (
        model.width // QUERIES,
        model.width // KEYS,
        model.head_dim // 2,
        f"{name}.self_attn",
    )
    yield untested_archs.hidden(f"{attention}.q_a_proj", queries, model.width)
    yield untested_archs.gains(f"{attention}.q_a_layernorm.weight", queries)
    yield untested_archs.hidden(f"{attention}.q_b_proj", model.width, queries)
    yield untested_archs.hidden(
        f"{attention}.kv_a_proj_with_mqa", keys + turned, model.width, growing=keys
    )
    yield untested_archs.gains(f"{attention}.kv_a_layernorm.weight", keys)
    yield untested_archs.hidden(
        f"{attention}.kv_b_proj", model.heads * (model.head_dim - turned + model.head_dim), keys
    )
    yield untested_archs.hidden(f"{attention}.o_proj", model.width, model.width)
    yield from untested_archs.mlp(f"{name}.mlp", model)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield untested_archs.gains(f"{name}.{norm}.weight", model.width)


MINICPM3 = untested_archs.Kind(
    "MiniCPM3", "minicpm3", "multi-head latent attention", layer, "model.norm.weight", needs=8,
    cannot=(
        f"latents: q_lora_rank is taken as hidden_size / {QUERIES} and kv_lora_rank as hidden_size / {KEYS}; ranks that do not grow with"
        " width would have other roles",
        "softmax multiplier: its scale is fixed, so it is written into q_b_proj (exact under AdamW, but for gradient clipping)",
    ),
)  # fmt: skip


def readout(transfer: Transfer, rows: list[Planned]) -> tuple[list[Planned], int]:
    """(rows, dim_model_base): the logits' multiplier as a whole number over the width, or else in the head's weights."""
    width, wanted = (
        transfer.target.model.width,
        transfer.multipliers["logits"] * transfer.target.model.width,
    )
    if abs(round(wanted) - wanted) < 1e-9 * wanted:
        return rows, round(wanted)
    if not any(row.name == "lm_head.weight" for row in rows):
        raise UserError(
            f"MiniCPM3 multiplies logits by dim_model_base / hidden_size, both whole, and a tied head would need {wanted:.6g} / {width}:"
            " set model.tied = false or another logits_multiplier"
        )
    theta = width / wanted
    return [
        shift(row, theta, row.family) if row.name == "lm_head.weight" else row for row in rows
    ], width


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    rows = untested_archs.planned(MINICPM3, transfer)
    model, m = transfer.target.model, transfer.multipliers
    assert isinstance(model, Transformer)
    if model.kv_heads not in (None, model.heads):
        raise UserError(
            f"a MiniCPM3 has as many key-value heads as heads, but got kv_heads={model.kv_heads}, heads={model.heads}"
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
        "q_lora_rank": model.width // QUERIES, "kv_lora_rank": model.width // KEYS, "qk_rope_head_dim": model.head_dim // 2,
        "qk_nope_head_dim": model.head_dim - model.head_dim // 2, "v_head_dim": model.head_dim, "scale_emb": m["embedding"],
        "scale_depth": m["residual"] * model.depth**0.5, "dim_model_base": base,
    }  # fmt: skip
    return untested_archs.emit(MINICPM3, transfer, rows, own, folder)
