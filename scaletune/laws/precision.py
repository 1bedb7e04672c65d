"""Published laws of the loss with low precision, quantization or pruning."""

from __future__ import annotations

import math

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_UNSTATED, D


def effective_share(bits: float, g: float, n: float) -> float:
    """Share of effective parameters, 1 - exp(-bits/g + n)    arXiv:2411.04330, Table 2."""
    return 1 - math.exp(-bits / g + n)


def trained(
    N: float,
    D: float,
    Pw: float,
    Pa: float,
    Pkv: float,
    *,
    E0: float,
    A: float,
    B: float,
    alpha: float,
    gw: float,
    nw: float,
    ga: float,
    na: float,
    gkv: float,
    nkv: float,
) -> dict[str, float]:
    """L = E0 + A (N f_w f_a f_kv)^-alpha + B D^-alpha    arXiv:2411.04330.

    The loss is nan if a share f is not positive: then no effective parameters remain.
    """
    shares = (
        effective_share(Pw, gw, nw),
        effective_share(Pa, ga, na),
        effective_share(Pkv, gkv, nkv),
    )
    effective = N * math.prod(shares) if min(shares) > 0 else 0.0
    return {"loss": E0 + A * effective**-alpha + B * D**-alpha if effective else math.nan}


def quantized(
    N: float, D: float, P: float, *, CT: float, gD: float, gN: float, gpost: float
) -> dict[str, float]:
    """CT D^gD N^-gN exp(-P/gpost)    arXiv:2411.04330, eq. 2."""
    return {"loss_increase": CT * D**gD / N**gN * math.exp(-P / gpost)}


def pruned(
    N: float,
    D: float,
    S: float,
    *,
    aS: float,
    bS: float,
    cS: float,
    bN: float,
    aD: float,
    bD: float,
    c: float,
) -> dict[str, float]:
    """L = (aS (1-S)^bS + cS) N^-bN + (aD/D)^bD + c    arXiv:2309.08520."""
    return {"loss": (aS * (1 - S) ** bS + cS) * N**-bN + (aD / D) ** bD + c}


BITS = tuple(
    Input(
        symbol, column, f"bits per {what} in training; the default is full precision", default=16.0
    )
    for symbol, column, what in (
        ("Pw", "bits_weights", "weight"),
        ("Pa", "bits_activations", "activation"),
        ("Pkv", "bits_kv", "key or value"),
    )
)

LAWS = (
    Law(
        id="precision",
        name="Training in low precision: loss",
        summary="Predicts the loss of low-precision training from model size, tokens and bits.",
        kind="precision",
        formula=(
            "f = (1 - exp(-Pw / gw + nw)) * (1 - exp(-Pa / ga + na)) * (1 - exp(-Pkv / gkv "
            "+ nkv)); loss = E0 + A * (N * f)**-alpha + B * D**-alpha"
        ),
        function=trained,
        inputs=(N_UNSTATED, D, *BITS),
        gives=("loss",),
        coefficients={
            "E0": 2.7648,
            "A": 4299.0,
            "B": 18060.0,
            "alpha": 0.4965,
            "gw": 2.6745,
            "nw": 0.3037,
            "ga": 2.2102,
            "na": 1.4072,
            "gkv": 0.9578,
            "nkv": 2.4185,
        },
        fitted={
            "n_params": (30e6, 1.7e9),
            "tokens": (1.5e9, 26e9),
            "bits_weights": (3, 16),
            "bits_activations": (3, 16),
            "bits_kv": (3, 16),
        },
        conditions={"data": "Dolma"},
        setup=(
            "465 runs, with one exponent for N and D. If compute is counted as N D bits, 7 "
            "to 8 bits are optimal."
        ),
        source="Kumar et al. 2024, arXiv:2411.04330, Table 2",
        caveats=(
            (
                "The main text of the paper omits the biases nw, na and nkv. The other "
                "constants are wrong without them, but are often quoted this way"
            ),
            (
                "The sign of the biases is inferred: with this sign, activations of 3 bits or "
                "fewer leave no effective parameters, and those runs diverged"
            ),
        ),
    ),
    Law(
        id="precision_ptq",
        name="Quantization after training: increase of the loss",
        summary=(
            "Predicts the loss increase by quantization after training from model size, "
            "tokens and bits."
        ),
        kind="precision",
        formula="loss_increase = CT * D**gD / N**gN * exp(-P / gpost)",
        function=quantized,
        inputs=(N_UNSTATED, D, Input("P", "bits_after", "bits per weight after training")),
        gives=("loss_increase",),
        coefficients={"CT": 0.0598, "gD": 0.5068, "gN": 0.3439, "gpost": 0.5907},
        fitted={"bits_after": (3, 6)},
        setup="The loss increase grows with the number of training tokens.",
        source="Kumar et al. 2024, arXiv:2411.04330, eq. 2 and Table 2",
        warnings=(
            (
                "The table of the paper lists a bias of 1.1277 next to gpost but does not say "
                "where it enters; the bias is omitted here"
            ),
        ),
        shown_at={"N": 220e6, "D": 26e9},
    ),
    Law(
        id="frantar_sparse",
        name="Pruned models: loss (functional form only)",
        summary=(
            "Gives the loss of pruned models from non-zero parameters, tokens and "
            "sparsity, without published coefficients."
        ),
        kind="sparsity",
        formula="loss = (aS * (1 - S)**bS + cS) * N**-bN + (aD / D)**bD + c",
        function=pruned,
        inputs=(
            Input("N", "n_nonzero", "non-zero parameters"),
            D,
            Input("S", "sparsity", "share of weights that are zero", default=0.0),
        ),
        gives=("loss",),
        unknown=dict.fromkeys(
            ("aS", "bS", "cS", "bN", "aD", "bD", "c"), "coefficient, to be fitted"
        ),
        setup="Sparsity multiplies the size term and does not change the other terms.",
        shown_at={
            "N": 1e10,
            "D": 1e10,
            "S": 0.75,
            "aS": 4,
            "bS": 0.5,
            "cS": 3,
            "bN": 0.1,
            "aD": 1e8,
            "bD": 0.5,
            "c": 1,
        },
        source="Frantar et al. 2023, arXiv:2309.08520",
    ),
)
