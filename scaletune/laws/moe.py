"""Published laws of the loss of mixture-of-experts models."""

from __future__ import annotations

import math
from dataclasses import replace

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_ACTIVE, N_TOTAL, D, E


def effective_experts(E: float, E_start: float, E_max: float) -> float:
    """Effective number of experts Eh of E experts    arXiv:2202.01169.

    1/Eh = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max.
    """
    return 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max)


def routed(
    N: float, E: float, *, a: float, b: float, c: float, d: float, E_start: float, E_max: float
) -> dict[str, float]:
    """log10 L = a log10 N + b log10 Eh + c log10 N log10 Eh + d    arXiv:2202.01169, Table 3."""
    n, e = math.log10(N), math.log10(effective_experts(E, E_start, E_max))
    return {"loss": 10 ** (a * n + b * e + c * n * e + d)}


def fine_grained(
    N: float,
    D: float,
    G: float,
    *,
    a: float,
    alpha: float,
    b: float,
    beta: float,
    g: float,
    gam: float,
    c: float,
) -> dict[str, float]:
    """L = c + (g G^-gam + a) N^-alpha + b D^-beta    arXiv:2402.07871."""
    return {"loss": c + (g / G**gam + a) / N**alpha + b / D**beta}


def joint_terms(
    E: float,
    *,
    a: float,
    alpha: float,
    delt: float,
    gam: float,
    b: float,
    beta: float,
    om: float,
    zet: float,
    E_start: float,
    E_max: float,
    c: float,
) -> tuple[float, float, float, float]:
    """m, mu, n, nu of L = m N^mu + n D^nu + c for E experts    arXiv:2502.05172, Table 4.

    mu and nu are negative.
    """
    e = effective_experts(E, E_start, E_max)
    return a * e**delt, alpha + gam * math.log(e), b * e**om, beta + zet * math.log(e)


def joint(N: float, D: float, E: float, **coefficients: float) -> dict[str, float]:
    """L = m N^mu + n D^nu + c    arXiv:2502.05172, eq. 6."""
    m, mu, n, nu = joint_terms(E, **coefficients)
    return {"loss": m * N**mu + n * D**nu + coefficients["c"]}


def sparse(
    N: float,
    D: float,
    S: float,
    *,
    a: float,
    alpha: float,
    b: float,
    beta: float,
    c: float,
    lam: float,
    d: float,
    delt: float,
    gam: float,
    e0: float,
) -> dict[str, float]:
    """L = a N^-alpha + b D^-beta + c (1-S)^-lam + d (1-S)^-delt N^-gam + e0    arXiv:2501.12370."""
    return {
        "loss": a / N**alpha
        + b / D**beta
        + c / (1 - S) ** lam
        + d / ((1 - S) ** delt * N**gam)
        + e0
    }


SBASE = Law(
    id="clark_sbase",
    name="Routed language models, S-BASE: loss",
    summary=(
        "Predicts the loss of S-BASE routed models from active parameters and number of experts."
    ),
    kind="moe",
    formula="Eh = 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max); "
    "loss = 10**(a * log10(N) + b * log10(Eh) + c * log10(N) * log10(Eh) + d)",
    function=routed,
    inputs=(N_ACTIVE, E),
    gives=("loss",),
    coefficients={
        "a": -0.082,
        "b": -0.108,
        "c": 0.009,
        "d": 1.104,
        "E_start": 1.847,
        "E_max": 314.478,
    },
    fitted={"n_active": (15e6, 1.3e9), "n_experts": (1, 512)},
    held={"tokens": 130e9},
    setup="All models trained on 130e9 tokens.",
    source="Clark et al. 2022, arXiv:2202.01169, Table 3",
    caveats=(
        "The logarithms are of base 10; natural logarithms give a loss of 0.58 at 1e9 parameters",
        (
            "Experts stop helping at N = 10**(-b / c). For S-BASE the rounded c gives "
            "1e12; the paper says 937e9"
        ),
    ),
    shown_at={"E": 64},
)

JOINT = Law(
    id="jointmoe",
    name="Joint MoE: loss over active parameters, tokens and experts",
    summary=(
        "Predicts the loss of mixtures of experts from active parameters, tokens and "
        "number of experts."
    ),
    kind="moe",
    formula=(
        "Eh = 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max); mu = "
        "alpha + gam * log(Eh); nu = beta + zet * log(Eh); m = a * Eh**delt; n = b * "
        "Eh**om; loss = m * N**mu + n * D**nu + c"
    ),
    function=joint,
    inputs=(
        Input(
            "N",
            "n_active_total",
            "active parameters, embeddings included",
            "in this law, N counts active parameters including the embeddings",
            instead=("n_active", "n_params"),
        ),
        D,
        E,
    ),
    gives=("loss",),
    coefficients={
        "a": 35.91,
        "alpha": -0.1889,
        "delt": -0.2285,
        "gam": 0.0098,
        "b": 35.98,
        "beta": -0.1775,
        "om": 0.5529,
        "zet": -0.0259,
        "E_start": 2.0732,
        "E_max": 290.4521,
        "c": 1.3637,
    },
    fitted={"n_params_total": (0.0, 5e9), "n_experts": (1, 32)},
    conditions={
        "model": "Switch mixture of experts, top-1 routing",
        "data": "FineWeb-Edu, GPT-2 tokenizer",
    },
    setup="280 runs, of which the 30 with the lowest loss were held out.",
    source="Ludziejewski et al. 2025, arXiv:2502.05172, Table 3",
    caveats=("alpha and beta are negative and are used as they are, without a further minus sign",),
)

LAWS = (
    SBASE,
    replace(
        SBASE,
        id="clark_rlr",
        name="Routed language models, RL-R: loss",
        summary=(
            "Predicts the loss of RL-R routed models from active parameters and number of experts."
        ),
        coefficients={
            "a": -0.083,
            "b": -0.126,
            "c": 0.012,
            "d": 1.111,
            "E_start": 1.88,
            "E_max": 469.982,
        },
    ),
    replace(
        SBASE,
        id="clark_hash",
        name="Routed language models, hash routing: loss",
        summary=(
            "Predicts the loss of hash-routed models from active parameters and number of experts."
        ),
        coefficients={
            "a": -0.087,
            "b": -0.136,
            "c": 0.012,
            "d": 1.157,
            "E_start": 4.175,
            "E_max": 477.741,
        },
    ),
    Law(
        id="krajewski_moe",
        name="Fine-grained experts: loss over size, tokens and granularity",
        summary=(
            "Predicts the loss of fine-grained mixtures of experts from model size, tokens "
            "and granularity."
        ),
        kind="moe",
        formula="loss = c + (g / G**gam + a) / N**alpha + b / D**beta",
        function=fine_grained,
        inputs=(
            Input(
                "N",
                "n_params_total",
                "all parameters, all experts included, without embeddings",
                instead=("n_params",),
            ),
            D,
            Input("G", "granularity", "granularity, 4 * d_model / d_expert", default=1.0),
        ),
        gives=("loss",),
        coefficients={
            "a": 18.1,
            "alpha": 0.115,
            "b": 30.8,
            "beta": 0.147,
            "g": 2.1,
            "gam": 0.58,
            "c": 0.47,
        },
        fitted={"n_params_total": (129e6, 3.7e9), "tokens": (16e9, 130e9), "granularity": (1, 16)},
        conditions={
            "model": "64 times the parameters of a dense layer, expert-choice routing",
            "data": "C4",
        },
        setup="Fitted together with the dense baseline krajewski_dense.",
        source="Krajewski et al. 2024, arXiv:2402.07871, Table 1",
        caveats=("Granularity is 4 d / d_expert here; Ling defines it as 2 d / d_expert",),
        unconfirmed=(
            (
                "the statement that N counts all experts without embeddings (do not use active "
                "parameters)"
            ),
        ),
    ),
    JOINT,
    Law(
        id="abnar_sparsity",
        name="Loss of sparse mixtures of experts over size, tokens and sparsity",
        summary=(
            "Predicts the loss of mixtures of experts from total parameters, tokens and sparsity."
        ),
        kind="moe",
        formula=(
            "loss = a / N**alpha + b / D**beta + c / (1 - S)**lam + d / ((1 - S)**delt * "
            "N**gam) + e0"
        ),
        function=sparse,
        inputs=(
            N_TOTAL,
            D,
            Input("S", "sparsity", "share of experts not chosen for a token", default=0.0),
        ),
        gives=("loss",),
        coefficients={
            "a": 16612.5,
            "alpha": 0.5962,
            "b": 5455.67,
            "beta": 0.3954,
            "c": 0.4598,
            "lam": -0.1666,
            "d": 17.26,
            "delt": 0.1603,
            "gam": 0.1595,
            "e0": 0.94,
        },
        fitted={"sparsity": (0, 0.98)},
        setup="R2 is 0.68 on held-out runs.",
        source="Abnar et al. 2025, arXiv:2501.12370, Table 3",
        warnings=("On held-out runs this law explains only 68 % of the variance",),
    ),
)
