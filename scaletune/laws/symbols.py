"""Inputs that many laws share, each with the counting convention of the source."""

from __future__ import annotations

from scaletune.laws.entry import Input

N_BODY = Input("N", "n_params", "parameters without the embedding and the output head")
N_WITH_HEAD = Input(
    "N",
    "n_params_with_head",
    "parameters with the output head (vocabulary x width, once), without the input embedding",
    (
        "in this law, N includes the output head (vocabulary x width), which n_params "
        "leaves out; this matters most for small models"
    ),
    instead=("n_params",),
)
N_TOTAL = Input(
    "N",
    "n_params_total",
    "all parameters, both embeddings included",
    (
        "in this law, N counts all parameters, but n_params leaves out the embeddings: "
        "about 47491 * n_params**(1/3) more in Chinchilla-like shapes "
        "(arXiv:2406.12907)"
    ),
    instead=("n_params",),
)
N_UNSTATED = Input(
    "N",
    "n_params",
    "parameters; the source does not say whether embeddings count",
    instead=("n_params_total",),
    doubt="the source does not say whether N includes embeddings",
)
N_ACTIVE = Input(
    "N",
    "n_active",
    "active parameters per token, without embedding and head",
    "in this law, N counts active parameters: n_params is used for them, as for a dense model",
    instead=("n_params",),
)
D = Input("D", "tokens", "tokens trained on")
B = Input("B", "batch_tokens", "batch size, tokens per optimizer step")
L = Input("L", "loss", "loss, nats per token")
E = Input("E", "n_experts", "experts per layer; 1 is a dense model", default=1.0)
C_6ND = Input("C", "flops", "training FLOPs, 6 N D")
C_6ND_TOTAL = Input(
    "C",
    "flops",
    "training FLOPs, 6 N D with all parameters",
    "in this law, N counts all parameters, so C is a little larger",
)
C_MD = Input(
    "C",
    "flops",
    (
        "training FLOPs M * D, where M (FLOPs per token) counts the blocks and "
        "attention, not the vocabulary"
    ),
    "this law's C includes attention, which makes C 1.1 to 2.3 times larger",
)
C_PF = Input(
    "C",
    "flops",
    "training FLOPs without embeddings; the formula converts them to PF-days of 8.64e19 FLOPs",
)
C_UNSTATED = Input("C", "flops", "training FLOPs; the source does not say how they are counted")

PF_DAY = 8.64e19  # FLOPs
