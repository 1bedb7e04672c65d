"""Published counts: FLOPs per token, parameters with and without embeddings."""

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
        name="DeepSeek, FLOPs per token without the vocabulary",
        kind="counting",
        formula="flops_per_token = 72 * n_layer * d_model**2 + 12 * n_layer * d_model * l_seq; flops = flops_per_token * D",
        function=deepseek,
        inputs=(
            Input("n_layer", "depth", "layers"),
            Input("d_model", "width", "width"),
            Input("l_seq", "seq_len", "tokens a sequence"),
            D,
        ),
        gives=("flops_per_token", "flops"),
        setup="forward and backward, attention over the whole square (a causal half would be 6 n d l); blocks of 12 d**2 parameters",
        source="DeepSeek-AI 2024, arXiv:2401.02954, eq. 2",
        traps=(
            "6N as usually counted is 72 n d**2: it misses attention. The C of deepseek_lr_bs and deepseek_alloc is this one",
        ),
    ),
    Law(
        id="pearce_embed",
        name="All parameters from those without embeddings",
        kind="counting",
        formula="n_params_total = N + omega * N**(1 / 3)",
        function=with_embeddings,
        inputs=(N_BODY,),
        gives=("n_params_total",),
        coefficients={"omega": 47491},
        conditions={"model": "shapes like Chinchilla's"},
        setup="reproduces Kaplan's exponent 0.74 to 0.78 of N over compute from Chinchilla's constants",
        source="Pearce & Song 2024, arXiv:2406.12907",
    ),
)
