"""Hugging Face Falcon-H1: a Mamba-2 mixer (arXiv:2405.21060) beside attention in every layer. See `unproven`.

Its heads grow in number with width; their size and state stay, so what a state meets is finite and its matrices are hidden ones. Read in
transformers 5.23.0: every multiplier multiplies, the key's stands for the softmax's, and each branch has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scaletune.rules import Tensor
from scaletune.transferring import Transfer
from scaletune.transferring.formats import untested_archs
from scaletune.zoo import Transformer

STATE, TAPS = 128, 4  # of a Mamba head; of its convolution


def layer(name: str, model: Transformer) -> Iterator[Tensor]:
    """One layer. The convolution is by channel, so its taps are an embedding's: finite fan-in, and a channel for each unit of width."""
    width, heads, channels = model.width, model.heads, model.width + 2 * STATE
    yield untested_archs.hidden(
        f"{name}.mamba.in_proj", width + channels + heads, width, growing=2 * width + heads
    )
    yield Tensor(
        f"{name}.mamba.conv1d.weight",
        "emb",
        (channels, 1, TAPS),
        "conv",
        True,
        own_fans=(TAPS, width),
    )
    yield untested_archs.gains(f"{name}.mamba.conv1d.bias", channels, growing=width)
    for vector in ("dt_bias", "A_log", "D"):
        yield untested_archs.gains(f"{name}.mamba.{vector}", heads)
    yield untested_archs.hidden(f"{name}.mamba.out_proj", width, width)
    for proj, fan_out in (
        ("q_proj", width),
        ("k_proj", model.kv_width),
        ("v_proj", model.kv_width),
        ("o_proj", width),
    ):
        yield untested_archs.hidden(f"{name}.self_attn.{proj}", fan_out, width)
    yield from untested_archs.mlp(f"{name}.feed_forward", model)
    for norm in ("input_layernorm", "pre_ff_layernorm"):
        yield untested_archs.gains(f"{name}.{norm}.weight", width)


FALCON_H1 = untested_archs.Kind(
    "FalconH1", "falcon_h1", "a Mamba mixer", layer, "model.final_layernorm.weight", needs=2,
    cannot=(
        f"mixer: as wide as the model, heads of the attention's size, mamba_d_state {STATE}, one group, no norm of its own",
        "A_log: transformers starts the heads at decays 1, 2, ..., so a wider model, which has more heads, starts with faster ones",
    ),
)  # fmt: skip


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`config.json`, `param_groups.json`, `loader.py`."""
    rows = untested_archs.planned(FALCON_H1, transfer)
    model, m = transfer.target.model, transfer.multipliers
    assert isinstance(model, Transformer)
    own = {
        "mamba_d_ssm": model.width, "mamba_n_heads": model.heads, "mamba_d_head": model.head_dim, "mamba_n_groups": 1,
        "mamba_d_state": STATE, "mamba_d_conv": TAPS, "mamba_expand": 1, "mamba_rms_norm": False, "mamba_conv_bias": True,
        "mamba_proj_bias": False, "projectors_bias": False, "embedding_multiplier": m["embedding"], "lm_head_multiplier": m["logits"],
        "key_multiplier": m["attention"] * model.head_dim**0.5, "attention_in_multiplier": 1.0, "attention_out_multiplier": m["residual"],
        "mlp_multipliers": [1.0, m["residual"]], "ssm_in_multiplier": 1.0, "ssm_out_multiplier": m["residual"],
        "ssm_multipliers": [1.0] * 5,
    }  # fmt: skip
    return untested_archs.emit(FALCON_H1, transfer, rows, own, folder)
