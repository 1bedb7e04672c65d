"""Writes a Falcon-H1 config.json (Hugging Face transformers). Needs `force`.

Every layer has a Mamba-2 mixer (arXiv:2405.21060) parallel to the attention. The number of heads
grows with width; head size and state size stay. So the state has a finite fan-in, and the mixer's
matrices are hidden ones. Checked in transformers 5.23.0: all multipliers multiply, `key_multiplier`
acts as the softmax scale, and each branch has its own multiplier. See `untested_archs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scaletune.rules import Tensor
from scaletune.transferring.formats import untested_archs
from scaletune.transferring.target import Transfer
from scaletune.zoo import TransformerConfig

STATE, TAPS = 128, 4
"""State size of a Mamba head; kernel size of its convolution."""


def layer(name: str, model: TransformerConfig) -> Iterator[Tensor]:
    """The tensors of one layer.

    The convolution is depthwise: its fan-in is finite and its channels grow with width, as in an
    embedding.
    """
    width, heads, channels = model.width, model.heads, model.width + 2 * STATE
    mamba, attention = f"{name}.mamba", f"{name}.self_attn"
    rows, growing = width + channels + heads, 2 * width + heads
    yield untested_archs.hidden_matrix(f"{mamba}.in_proj", rows, width, growing=growing)
    kernel = (channels, 1, TAPS)
    yield Tensor(f"{mamba}.conv1d.weight", "emb", kernel, "conv", True, own_fans=(TAPS, width))
    yield untested_archs.gain(f"{mamba}.conv1d.bias", channels, growing=width)
    for vector in ("dt_bias", "A_log", "D"):
        yield untested_archs.gain(f"{mamba}.{vector}", heads)
    yield untested_archs.hidden_matrix(f"{mamba}.out_proj", width, width)
    yield untested_archs.hidden_matrix(f"{attention}.q_proj", width, width)
    yield untested_archs.hidden_matrix(f"{attention}.k_proj", model.kv_width, width)
    yield untested_archs.hidden_matrix(f"{attention}.v_proj", model.kv_width, width)
    yield untested_archs.hidden_matrix(f"{attention}.o_proj", width, width)
    yield from untested_archs.mlp(f"{name}.feed_forward", model)
    for norm in ("input_layernorm", "pre_ff_layernorm"):
        yield untested_archs.gain(f"{name}.{norm}.weight", width)


FALCON_H1 = untested_archs.UntestedArch(
    "FalconH1",
    "falcon_h1",
    "a Mamba mixer",
    layer,
    "model.final_layernorm.weight",
    multiple_of=2,
    cannot=(
        "mixer: it has the model's width, heads of the attention's size, mamba_d_state"
        f" {STATE}, one group and no norm",
        "A_log: transformers initializes the heads with decays 1, 2, ..., so a wider model, which"
        " has more heads, starts with faster decays",
    ),
)


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes config.json, param_groups.json and loader.py."""
    rows = untested_archs.plan_tensors(FALCON_H1, transfer)
    model, m = transfer.target.model, transfer.multipliers
    assert isinstance(model, TransformerConfig)
    own = {
        "mamba_d_ssm": model.width,
        "mamba_n_heads": model.heads,
        "mamba_d_head": model.head_dim,
        "mamba_n_groups": 1,
        "mamba_d_state": STATE,
        "mamba_d_conv": TAPS,
        "mamba_expand": 1,
        "mamba_rms_norm": False,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "projectors_bias": False,
        "embedding_multiplier": m["embedding"],
        "lm_head_multiplier": m["logits"],
        "key_multiplier": m["attention"] * model.head_dim**0.5,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": m["residual"],
        "mlp_multipliers": [1.0, m["residual"]],
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": m["residual"],
        "ssm_multipliers": [1.0] * 5,
    }
    return untested_archs.emit(FALCON_H1, transfer, rows, own, folder)
