"""Inputs that many laws share, each with how the source counts it."""

from __future__ import annotations

from scaletune.laws.entry import Input

N_BODY = Input("N", "n_params", "parameters without the embedding and the output head")
N_WITH_HEAD = Input(
    "N",
    "n_params_with_head",
    "parameters with the output head (vocabulary x width, once), without the input embedding",
    "its N counts the output head (vocabulary x width), which n_params leaves out; that matters most in small models",
    instead=("n_params",),
)
N_TOTAL = Input(
    "N",
    "n_params_total",
    "all parameters, both embeddings included",
    "its N counts all parameters, while n_params leaves the embeddings out: "
    "about 47491 * n_params**(1/3) more in Chinchilla-like shapes (arXiv:2406.12907)",
    instead=("n_params",),
)
N_UNSTATED = Input(
    "N",
    "n_params",
    "parameters; whether embeddings count is not recorded",
    instead=("n_params_total",),
    doubt="whether its N counts embeddings is not recorded",
)
N_ACTIVE = Input(
    "N",
    "n_active",
    "active parameters: those a token passes through, without embedding and head",
    "its N counts active parameters: n_params is taken for them, as in a dense model",
    instead=("n_params",),
)
D = Input("D", "tokens", "tokens trained on")
B = Input("B", "batch_tokens", "batch size, tokens an optimizer step")
L = Input("L", "loss", "loss, nats per token")
E = Input("E", "n_experts", "experts a layer; 1 is a dense model", default=1.0)
C_6ND = Input("C", "flops", "training FLOPs, 6 N D")
C_6ND_TOTAL = Input(
    "C",
    "flops",
    "training FLOPs, 6 N D with all parameters",
    "its N counts all parameters, so its C is a little larger",
)
C_MD = Input(
    "C",
    "flops",
    "training FLOPs M * D, where M (FLOPs per token) counts the blocks and attention, not the vocabulary",
    "its C counts attention too, which makes C 1.1 to 2.3 times larger",
)
C_PF = Input(
    "C",
    "flops",
    "training FLOPs without embeddings; the formula turns them into PF-days, 8.64e19 FLOPs each",
)
C_UNSTATED = Input("C", "flops", "training FLOPs; how they are counted is not pinned down")

PF_DAY = 8.64e19  # FLOPs
