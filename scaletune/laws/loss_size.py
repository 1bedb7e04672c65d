"""Published laws of the loss in one variable: parameters (also with parallel streams) or tokens."""

from __future__ import annotations

import math
from dataclasses import replace

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_BODY, N_UNSTATED

KAPLAN_RUNS = {
    "schedule": "3000 steps of warmup, then cosine to zero over 250000 steps",
    "batch": "524288 tokens",
    "optimizer": "Adam; Adafactor above 1e9 parameters",
    "data": "WebText2",
}


def power_of_size(N: float, *, N_c: float, alpha_N: float) -> dict[str, float]:
    """L = (N_c/N)^alpha_N    arXiv:2001.08361, eq. 1.1."""
    return {"loss": (N_c / N) ** alpha_N}


def power_of_tokens(D: float, *, D_c: float, alpha_D: float) -> dict[str, float]:
    """L = (D_c/D)^alpha_D    arXiv:2001.08361, eq. 1.2."""
    return {"loss": (D_c / D) ** alpha_D}


def streamed(
    N: float, P: float, *, E0: float, A: float, alpha: float, k: float
) -> dict[str, float]:
    """L = E0 + (1e9 A / (N (k ln P + 1)))^alpha    arXiv:2505.10475."""
    return {"loss": E0 + (A * 1e9 / (N * (k * math.log(P) + 1))) ** alpha}


def shared_capacity(
    N: float, *, beta: float, f: float, alpha: float, Linf: float
) -> dict[str, float]:
    """L = beta (f N)^-alpha + Linf, for one language pair    arXiv:2302.09650."""
    return {"loss": beta * (f * N) ** -alpha + Linf}


KAPLAN = Law(
    id="kaplan_L_N",
    name="Kaplan et al.: loss over model size",
    summary="Predicts the loss at convergence from model size.",
    kind="loss_size",
    formula="loss = (N_c / N)**alpha_N",
    function=power_of_size,
    inputs=(N_BODY,),
    gives=("loss",),
    coefficients={"N_c": 8.8e13, "alpha_N": 0.076},
    fitted={"n_params": (768, 1.5e9)},
    conditions=KAPLAN_RUNS,
    setup="Models trained to convergence with unlimited data.",
    source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1",
    caveats=(
        "The law has no irreducible loss, so its exponent cannot be compared with Chinchilla's",
    ),
)

PARSCALE = Law(
    id="parscale_stack",
    name="ParScale: loss with parallel streams, Python of Stack-V2",
    summary="Predicts the loss on Python code from model size and number of parallel streams.",
    kind="loss_size",
    formula="loss = E0 + (A * 1e9 / (N * (k * log(P) + 1)))**alpha",
    function=streamed,
    inputs=(
        replace(N_BODY, means=f"{N_BODY.means}; grows a little with P"),
        Input("P", "streams", "parallel streams of the model", default=1.0),
    ),
    gives=("loss",),
    coefficients={"E0": 0.69123678, "A": 0.01130616, "alpha": 0.18937067, "k": 0.393463},
    fitted={"n_params": (536e6, 4.41e9), "streams": (1, 8)},
    held={"tokens": 42e9},
    conditions={"data": "Stack-V2, Python"},
    setup=(
        "24 runs, Huber loss with delta 1e-3. P streams have the effect of k ln P + 1 "
        "times the parameters."
    ),
    source="Chen et al. 2025, arXiv:2505.10475; its released fit, repeated",
    caveats=(
        "A is inside the power, in billions of parameters",
        "There is no token term: the law holds only at the tokens of its runs",
    ),
    unconfirmed=("the statement that all runs had 42e9 tokens",),
)

LAWS = (
    KAPLAN,
    Law(
        id="kaplan_L_D",
        name="Kaplan et al.: loss over tokens",
        summary="Predicts the early-stopped loss of large models from the size of the data set.",
        kind="loss_size",
        formula="loss = (D_c / D)**alpha_D",
        function=power_of_tokens,
        inputs=(
            Input(
                "D",
                "unique_tokens",
                "tokens of the data set",
                "all tokens are taken as unique (one epoch)",
                instead=("tokens",),
            ),
        ),
        gives=("loss",),
        coefficients={"D_c": 5.4e13, "alpha_D": 0.095},
        fitted={"unique_tokens": (22e6, 23e9)},
        conditions=KAPLAN_RUNS,
        setup="Large models trained for many epochs, stopped early.",
        source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.2",
        caveats=(
            (
                "It does not combine with kaplan_L_N by adding reciprocals: the joint law is "
                "kaplan_L_ND"
            ),
        ),
    ),
    replace(
        KAPLAN,
        id="clark_dense",
        name="Routed language models: loss of the dense baseline",
        summary="Predicts the loss of dense models from model size, at 130e9 tokens.",
        inputs=(N_UNSTATED,),
        coefficients={"N_c": 3.568e13, "alpha_N": 0.078},
        fitted={"n_params": (15e6, 1.3e9)},
        held={"tokens": 130e9},
        conditions={},
        setup="All models trained on 130e9 tokens.",
        source="Clark et al. 2022, arXiv:2202.01169",
    ),
    PARSCALE,
    replace(
        PARSCALE,
        id="parscale_pile",
        name="ParScale: loss with parallel streams, the Pile",
        summary="Predicts the loss on the Pile from model size and number of parallel streams.",
        coefficients={"E0": 1.28876563, "A": 0.19735203, "alpha": 0.19633308, "k": 0.33445557},
        conditions={"data": "the Pile"},
    ),
    Law(
        id="nmt_multilingual",
        name="Multilingual translation: loss of one language pair over model size",
        summary=(
            "Gives the loss of one language pair as a power of model size, without "
            "published coefficients."
        ),
        kind="loss_size",
        formula="loss = beta * (f * N)**-alpha + Linf",
        function=shared_capacity,
        inputs=(N_BODY,),
        gives=("loss",),
        unknown={
            "beta": "prefactor of the pair",
            "f": "share of the capacity that the pair gets; depends on its sampling weight alone",
            "alpha": "exponent of the pair",
            "Linf": "loss of the pair for an infinitely large model",
        },
        fitted={"n_params": (20e6, 1e9)},
        setup="The sampling weight of a pair changes f and does not change the exponent.",
        shown_at={"N": 2e10, "beta": 2, "f": 0.5, "alpha": 0.1, "Linf": 1},
        source="Fernandes et al. 2023, arXiv:2302.09650",
        confirmed=False,
        unconfirmed=(
            "the form p + c1 * p**c2 * (1 - p)**c3 of f as a function of the sampling weight p",
        ),
    ),
)
