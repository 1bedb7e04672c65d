"""Published laws of the loss with few bits or few weights."""

from __future__ import annotations

import math

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_UNSTATED, D


def kept(bits: float, g: float, n: float) -> float:
    """The share of parameters that precision leaves: 1 - exp(-bits/g + n)    arXiv:2411.04330, Table 2."""
    return 1 - math.exp(-bits / g + n)


def trained(
    N: float, D: float, Pw: float, Pa: float, Pkv: float,
    *, E0: float, A: float, B: float, alpha: float, gw: float, nw: float, ga: float, na: float, gkv: float, nkv: float,
) -> dict[str, float]:  # fmt: skip
    """L = E0 + A (N f_w f_a f_kv)^-alpha + B D^-alpha; no number where too few bits leave nothing    arXiv:2411.04330."""
    shares = (kept(Pw, gw, nw), kept(Pa, ga, na), kept(Pkv, gkv, nkv))
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
    Input(symbol, column, f"bits {what} in training; many where they are left alone", default=16.0)
    for symbol, column, what in (
        ("Pw", "bits_weights", "a weight"),
        ("Pa", "bits_activations", "an activation"),
        ("Pkv", "bits_kv", "a key or value"),
    )
)

LAWS = (
    Law(
        id="precision",
        name="Training in few bits",
        kind="precision",
        formula="f = (1 - exp(-Pw / gw + nw)) * (1 - exp(-Pa / ga + na)) * (1 - exp(-Pkv / gkv + nkv)); loss = E0 + A * (N * f)**-alpha + B * D**-alpha",
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
        setup="465 runs, one exponent for N and D; where compute is counted N D bits, 7 to 8 bits are best",
        source="Kumar et al. 2024, arXiv:2411.04330, Table 2",
        traps=(
            "the main text leaves out the biases nw, na and nkv: the other constants mean nothing without them, and circulate so",
            "the sign of the biases is inferred: with it activations of 3 bits or fewer leave no parameters, as those runs diverged",
        ),
    ),
    Law(
        id="precision_ptq",
        name="Quantizing after training: what is lost",
        kind="precision",
        formula="loss_increase = CT * D**gD / N**gN * exp(-P / gpost)",
        function=quantized,
        inputs=(N_UNSTATED, D, Input("P", "bits_after", "bits a weight after training")),
        gives=("loss_increase",),
        coefficients={"CT": 0.0598, "gD": 0.5068, "gN": 0.3439, "gpost": 0.5907},
        fitted={"bits_after": (3, 6)},
        setup="the more tokens, the more is lost",
        source="Kumar et al. 2024, arXiv:2411.04330, eq. 2 and Table 2",
        cautions=(
            "its table lists a bias of 1.1277 beside gpost without saying where it enters: it is left out here",
        ),
        shown_at={"N": 220e6, "D": 26e9},
    ),
    Law(
        id="frantar_sparse",
        name="Pruned models: the form alone",
        kind="sparsity",
        formula="loss = (aS * (1 - S)**bS + cS) * N**-bN + (aD / D)**bD + c",
        function=pruned,
        inputs=(
            Input("N", "n_nonzero", "non-zero parameters"),
            D,
            Input("S", "sparsity", "share of weights that are zero", default=0.0),
        ),
        gives=("loss",),
        unknown=dict.fromkeys(("aS", "bS", "cS", "bN", "aD", "bD", "c"), "to be fitted"),
        setup="sparsity multiplies the term of size and leaves the others",
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
