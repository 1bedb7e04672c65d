"""Published counting rules: FLOPs per token, and parameters with and without embeddings."""

from __future__ import annotations

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_BODY, D


def deepseek(n_layer: float, d_model: float, l_seq: float, D: float) -> dict[str, float]:
    """M = 72 n d^2 + 12 n d l, C = M D    arXiv:2401.02954, eq. 2."""
    M = 72 * n_layer * d_model**2 + 12 * n_layer * d_model * l_seq
    return {"flops_per_token": M, "flops": M * D}


def with_embeddings(N: float, *, omega: float) -> dict[str, float]:
    """N + omega N^(1/3)    arXiv:2406.12907."""
    return {"n_params_total": N + omega * N ** (1 / 3)}


LAWS = (
    Law(
        id="deepseek_M",
        name="DeepSeek: FLOPs per token without the vocabulary",
        summary=(
            "Computes FLOPs per token and training FLOPs from depth, width, sequence "
            "length and tokens."
        ),
        kind="counting",
        formula=(
            "flops_per_token = 72 * n_layer * d_model**2 + 12 * n_layer * d_model * l_seq; "
            "flops = flops_per_token * D"
        ),
        function=deepseek,
        inputs=(
            Input("n_layer", "depth", "layers"),
            Input("d_model", "width", "width"),
            Input("l_seq", "seq_len", "tokens per sequence"),
            D,
        ),
        gives=("flops_per_token", "flops"),
        setup=(
            "Counts forward and backward pass, with attention over the full square (causal "
            "attention would be 6 n d l) and 12 d**2 parameters per block."
        ),
        source="DeepSeek-AI 2024, arXiv:2401.02954, eq. 2",
        caveats=(
            (
                "The usual 6N is 72 n d**2, which leaves out attention. The C of "
                "deepseek_lr_bs and deepseek_alloc is counted by this rule"
            ),
        ),
    ),
    Law(
        id="pearce_embed",
        name="Total parameters from parameters without embeddings",
        summary="Estimates the total parameter count from the count without embeddings.",
        kind="counting",
        formula="n_params_total = N + omega * N**(1 / 3)",
        function=with_embeddings,
        inputs=(N_BODY,),
        gives=("n_params_total",),
        coefficients={"omega": 47491},
        conditions={"model": "shapes like Chinchilla's"},
        setup=(
            "Reproduces Kaplan's exponent of N over compute, 0.74 to 0.78, from "
            "Chinchilla's constants."
        ),
        source="Pearce & Song 2024, arXiv:2406.12907",
    ),
)
