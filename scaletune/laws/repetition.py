"""Published laws of repeated data and of transfer from pretraining."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from scaletune.laws.entry import Input, Law
from scaletune.laws.loss import chinchilla
from scaletune.laws.symbols import N_BODY, N_TOTAL, N_UNSTATED, D


def effective_amount(total: Any, unique: Any, r_star: float) -> Any:
    """Effective amount of `total` when only `unique` of it is new    arXiv:2305.16264, eq. 5.

    The value of repeats decays with constant `r_star`. Accepts numbers or arrays, by
    operators only, because this package imports no array library.
    """
    beyond = total / unique - 1
    repeats = (beyond + abs(beyond)) / 2  # not below 0
    return unique * (1 + r_star * (1 - math.e ** (-repeats / r_star)))


def muennighoff(
    N: float,
    D: float,
    U: float,
    *,
    E0: float,
    A: float,
    B: float,
    alpha: float,
    beta: float,
    R_Dstar: float,
    R_Nstar: float,
) -> dict[str, float]:
    """`chinchilla` of effective tokens and effective parameters    arXiv:2305.16264."""
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    U_N = min(N, (U * G) ** (beta / alpha) * G)  # the most parameters that U unique tokens can feed
    return chinchilla(
        effective_amount(N, U_N, R_Nstar),
        effective_amount(D, U, R_Dstar),
        E0=E0,
        A=A,
        B=B,
        alpha=alpha,
        beta=beta,
    )


def asymptote(N: float, *, E0: float, A: float, alpha: float) -> dict[str, float]:
    """L = E0 + A (N/1e9)^-alpha    arXiv:2509.14786."""
    return {"loss": E0 + A * (N / 1e9) ** -alpha}


def transferred(DF: float, N: float, *, k: float, alpha: float, beta: float) -> dict[str, float]:
    """k DF^alpha N^beta    arXiv:2102.01293, Table 1."""
    return {"transferred_characters": k * DF**alpha * N**beta}


LAWS = (
    Law(
        id="muennighoff",
        name="Data-constrained scaling: loss with repeated data",
        summary=(
            "Predicts the loss from model size, tokens and unique tokens when data is repeated."
        ),
        kind="repetition",
        formula=(
            "G = (alpha * A / (beta * B))**(1 / (alpha + beta)); U_N = min(N, (U * "
            "G)**(beta / alpha) * G); R_N = max(N / U_N - 1, 0); R_D = max(D / U - 1, 0); "
            "N_eff = U_N + U_N * R_Nstar * (1 - exp(-R_N / R_Nstar)); D_eff = U + U * "
            "R_Dstar * (1 - exp(-R_D / R_Dstar)); loss = E0 + A * N_eff**-alpha + B * "
            "D_eff**-beta"
        ),
        function=muennighoff,
        inputs=(
            N_TOTAL,
            replace(D, means="tokens trained on, repeats included"),
            Input(
                "U",
                "unique_tokens",
                "unique tokens",
                "all tokens are taken as unique (one epoch, U = D)",
                instead=("tokens",),
            ),
        ),
        gives=("loss",),
        coefficients={
            "E0": 1.86914367841,
            "A": 520.82495166,
            "B": 1487.71609378,
            "alpha": 0.3526596,
            "beta": 0.3526596,
            "R_Dstar": 15.387756,
            "R_Nstar": 5.309743,
        },
        fitted={"n_params_total": (7e6, 9e9), "tokens": (1e8, 9e11), "epochs": (1, 500)},
        conditions={"schedule": "cosine", "optimizer": "Adam", "data": "C4 and OSCAR"},
        setup=(
            "alpha = beta is imposed. The coefficients are fitted to 54 runs of one epoch, "
            "the two R to 182 runs."
        ),
        source=(
            "Muennighoff et al. 2023, arXiv:2305.16264; coefficients from the datablations "
            "repository"
        ),
        caveats=(
            "R counts repetitions: epochs minus one",
            (
                "Runs in which more epochs increased the loss were excluded from the fit: the "
                "law cannot predict overfitting"
            ),
        ),
    ),
    Law(
        id="infinite_compute",
        name="200 million tokens with tuned regularization: loss over model size",
        summary=(
            "Predicts the loss with 200 million unique tokens and tuned regularization "
            "from model size."
        ),
        kind="repetition",
        formula="loss = E0 + A * (N / 1e9)**-alpha",
        function=asymptote,
        inputs=(N_UNSTATED,),
        gives=("loss",),
        coefficients={"E0": 3.43, "A": 0.05, "alpha": 1.02},
        fitted={"n_params": (150e6, 1.4e9)},
        held={"unique_tokens": 2e8},
        conditions={"data": "DCLM"},
        setup=(
            "Weight decay, lr and epochs are tuned together. The losses of infinitely "
            "large models are 3.75 without tuning, 3.43 with regularization, 3.34 for an "
            "ensemble of models of 300e6 parameters, and 3.17 for an ensemble whose models "
            "grow too."
        ),
        source="Kim et al. 2025, arXiv:2509.14786",
        warnings=(
            (
                "It is inferred, not stated, that N is in billions; otherwise the size term "
                "would vanish"
            ),
        ),
        shown_at={"N": 0.3e9},
    ),
    Law(
        id="hernandez_transfer",
        name="Transfer from text to code: data that pretraining saves",
        summary=(
            "Predicts how much fine-tuning data pretraining replaces, from fine-tuning "
            "data and model size."
        ),
        kind="repetition",
        formula="transferred_characters = k * DF**alpha * N**beta",
        function=transferred,
        inputs=(Input("DF", "finetune_characters", "characters fine-tuned on"), N_BODY),
        gives=("transferred_characters",),
        coefficients={"k": 1.9e4, "alpha": 0.18, "beta": 0.38},
        conditions={"data": "pretraining on text, fine-tuning on Python"},
        setup=(
            "The amount of fine-tuning data that pretraining saves. With pretraining on "
            "half text, half code: k = 2.1e5, alpha = 0.096."
        ),
        source="Hernandez et al. 2021, arXiv:2102.01293, Table 1",
        unconfirmed=("the statement that data is counted in characters",),
        shown_at={"N": 1e8},
    ),
)
