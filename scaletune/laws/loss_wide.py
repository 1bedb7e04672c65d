"""Published laws of the loss in N, D and further variables, or in other forms than Chinchilla's."""

from __future__ import annotations

import math

from scaletune.laws.entry import Input, Law
from scaletune.laws.loss_size import KAPLAN_RUNS
from scaletune.laws.symbols import N_BODY, N_TOTAL, D


def kaplan(
    N: float, D: float, *, N_c: float, D_c: float, alpha_N: float, alpha_D: float
) -> dict[str, float]:
    """L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D    arXiv:2001.08361, eq. 1.5."""
    return {"loss": ((N_c / N) ** (alpha_N / alpha_D) + D_c / D) ** alpha_D}


def farseer(
    N: float,
    D: float,
    *,
    a1: float,
    g1: float,
    b1: float,
    a2: float,
    g2: float,
    b2: float,
    a3: float,
    g3: float,
    b3: float,
) -> dict[str, float]:
    """exp(a3 N^g3 + b3) + exp(a2 N^g2 + b2) D^-exp(a1 N^g1 + b1)    arXiv:2506.10972, eq. 3."""
    minimum, prefactor, exponent = (
        math.exp(a * N**g + b) for a, g, b in ((a3, g3, b3), (a2, g2, b2), (a1, g1, b1))
    )
    return {"loss_per_char": minimum + prefactor * D**-exponent}


def shaped(
    w: float,
    depth: float,
    N: float,
    D: float,
    *,
    E0: float,
    cw: float,
    aw: float,
    cd: float,
    ad: float,
    cN: float,
    aN: float,
    cD: float,
    aD: float,
) -> dict[str, float]:
    """E0 + cw w^-aw + cd depth^-ad + cN N^-aN + cD D^-aD    arXiv:2502.06857."""
    return {"loss": E0 + cw * w**-aw + cd * depth**-ad + cN * N**-aN + cD * D**-aD}


def vocabulary(
    N: float,
    V: float,
    H: float,
    *,
    E0: float,
    A1: float,
    a1: float,
    A2: float,
    a2: float,
    B: float,
    b: float,
    unit_N: float,
    unit_H: float,
) -> dict[str, float]:
    """-E0 + A1 N^-a1 + A2 V^-a2 + B H^-b in the paper's units    arXiv:2407.13623."""
    return {
        "loss_over_unigram": -E0
        + A1 * (N / unit_N) ** -a1
        + A2 * (V / unit_N) ** -a2
        + B * (H / unit_H) ** -b
    }


LAWS = (
    Law(
        id="kaplan_L_ND",
        name="Kaplan et al.: loss over model size and data",
        summary="Predicts the early-stopped loss from model size and size of the data set.",
        kind="loss",
        formula="loss = ((N_c / N)**(alpha_N / alpha_D) + D_c / D)**alpha_D",
        function=kaplan,
        inputs=(
            N_BODY,
            Input(
                "D",
                "unique_tokens",
                "tokens of the data set",
                "all tokens are taken as unique (one epoch)",
                instead=("tokens",),
            ),
        ),
        gives=("loss",),
        coefficients={"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
        fitted={"n_params": (768, 1.5e9), "unique_tokens": (22e6, 23e9)},
        conditions=KAPLAN_RUNS | {"dropout": "10 %"},
        setup=(
            "Many epochs, stopped early. Overfitting is negligible from 5e3 * N**0.74 tokens on."
        ),
        source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5, Table 2",
        caveats=(
            "The constants differ from those of kaplan_L_N and kaplan_L_D",
            "D is the size of the data set, not the tokens processed: the compute is not 6 N D",
        ),
        shown_at={"D": 2e10},
    ),
    Law(
        id="farseer",
        name="Farseer (Predictable Scale II): loss",
        summary=(
            "Predicts the loss per character from model size and tokens, with an exponent "
            "of D that depends on N."
        ),
        kind="loss",
        formula=(
            "loss_per_char = exp(a3 * N**g3 + b3) + exp(a2 * N**g2 + b2) * D**-exp(a1 * N**g1 + b1)"
        ),
        function=farseer,
        inputs=(N_BODY, D),
        gives=("loss_per_char",),
        coefficients={
            "a1": -0.124,
            "g1": 0.123,
            "b1": 0.424,
            "a2": 88.01,
            "g2": -0.1,
            "b2": -6.287,
            "a3": -0.021,
            "g3": 0.169,
            "b3": 0.091,
        },
        fitted={"n_params": (200e6, 25e9), "tokens": (1e9, 500e9)},
        setup=(
            "About 1000 models. The exponent of D depends on N, so the optimal tokens per "
            "parameter rise with compute."
        ),
        source="Li et al. 2025, arXiv:2506.10972, eq. 3",
        caveats=(
            "The loss is in bits per character of a separate text set, not in nats per token",
        ),
        confirmed=False,
        unconfirmed=("all nine constants",),
    ),
    Law(
        id="gemstones_width_depth",
        name="Gemstones: loss over width, depth, size and tokens",
        summary="Predicts the loss from width, depth, model size and tokens.",
        kind="loss",
        formula="loss = E0 + cw * w**-aw + cd * depth**-ad + cN * N**-aN + cD * D**-aD",
        function=shaped,
        inputs=(
            Input("w", "width", "width, d_model"),
            Input("depth", "depth", "layers"),
            N_TOTAL,
            D,
        ),
        gives=("loss",),
        coefficients={
            "E0": 1.53450040085,
            "cw": 2.95070414474,
            "aw": 0.2195783536,
            "cd": 0.803565170434,
            "ad": 0.4758917337,
            "cN": 441.525408816,
            "aN": 0.3636454068,
            "cD": 35314.2826275,
            "aD": 0.4935127042,
        },
        fitted={
            "width": (256, 3072),
            "depth": (3, 80),
            "n_params_total": (50e6, 2e9),
            "tokens": (2e9, 350e9),
        },
        conditions={"schedule": "constant", "data": "Dolma"},
        setup="Fitted to runs beyond 100e9 tokens, before lr decay.",
        source="McLeish et al. 2025, arXiv:2502.06857; the fits of its repository",
        shown_at={"N": 1.3e9, "D": 1e11},
    ),
    Law(
        id="tao_vocab",
        name="Loss over model size, vocabulary and characters",
        summary=(
            "Predicts the loss relative to a unigram model from model size, vocabulary "
            "size and characters."
        ),
        kind="loss",
        formula=(
            "loss_over_unigram = -E0 + A1 * (N / unit_N)**-a1 + A2 * (V / unit_N)**-a2 + B "
            "* (H / unit_H)**-b"
        ),
        function=vocabulary,
        inputs=(
            N_BODY,
            Input("V", "n_vocab_params", "parameters of one vocabulary matrix: vocabulary x width"),
            Input("H", "characters", "characters trained on"),
        ),
        gives=("loss_over_unigram",),
        coefficients={
            "E0": 5.533,
            "A1": 1.831,
            "a1": 0.447,
            "A2": 0.196,
            "a2": 0.671,
            "B": 2.124,
            "b": 0.447,
        },
        unknown={
            "unit_N": "the paper's unit of parameters",
            "unit_H": "the paper's unit of characters",
        },
        fitted={"n_params": (33e6, 1.1e9)},
        setup=(
            "The loss is relative to that of a unigram model. The parameters of the "
            "optimal vocabulary scale as N**0.83."
        ),
        shown_at={"N": 1e9, "V": 1e9, "H": 1e10, "unit_N": 1e9, "unit_H": 1e10},
        source="Tao et al. 2024, arXiv:2407.13623",
        caveats=(
            (
                "With raw counts the power terms vanish (1.8 / 1e9**0.447 = 1.7e-4), so the "
                "paper must use other units; these are not confirmed"
            ),
        ),
    ),
)
