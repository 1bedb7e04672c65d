"""Published laws of the loss, in nats per token of their own data and tokenizer: compare slopes, not levels."""

from __future__ import annotations

import math
from dataclasses import replace

from scaletune.laws.entry import N_TOTAL, D, Input, Law


def chinchilla(N: float, D: float, *, E0: float, A: float, B: float, alpha: float, beta: float) -> dict[str, float]:
    """L = E0 + A N^-alpha + B D^-beta    arXiv:2203.15556, eq. 10."""
    return {"loss": E0 + A * N**-alpha + B * D**-beta}


def gadre(N: float, D: float, *, E0: float, a: float, b: float, eta: float) -> dict[str, float]:
    """L = E0 + (a M^eta + b M^-eta) C^-eta, with M = D/N and C = 6ND    arXiv:2403.08540."""
    M, C = D / N, 6 * N * D
    return {"loss": E0 + (a * M**eta + b * M**-eta) * C**-eta}


def worth(total: float, unique: float, r_star: float) -> float:
    """What `total` is worth when only `unique` of it is new: each repeat decays with constant `r_star`    arXiv:2305.16264."""
    repeats = max(total / unique - 1, 0)
    return unique + unique * r_star * (1 - math.exp(-repeats / r_star))


def muennighoff(
    N: float, D: float, U: float, *, E0: float, A: float, B: float, alpha: float, beta: float, R_Dstar: float, R_Nstar: float
) -> dict[str, float]:
    """`chinchilla` of what repeated tokens and excess parameters are worth    arXiv:2305.16264."""
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    U_N = min(N, (U * G) ** (beta / alpha) * G)  # the most parameters that U unique tokens can feed
    return chinchilla(worth(N, U_N, R_Nstar), worth(D, U, R_Dstar), E0=E0, A=A, B=B, alpha=alpha, beta=beta)


HOFFMANN = Law(
    id="hoffmann_tex",
    name="Chinchilla, approach 3, unrounded coefficients",
    kind="loss",
    formula="loss = E0 + A * N**-alpha + B * D**-beta",
    function=chinchilla,
    inputs=(N_TOTAL, D),
    gives=("loss",),
    coefficients={"E0": 1.693373681, "A": 406.401017519, "B": 410.722826945, "alpha": 0.33917084, "beta": 0.2849083},
    fitted={"n_params": (70e6, 16e9), "tokens": (5e9, 500e9)},
    conditions={
        "schedule": "cosine over the whole run, down to a tenth of the peak",
        "optimizer": "AdamW",
        "parametrization": "standard",
        "data": "MassiveText",
    },
    setup="Huber loss with delta 1e-3 on log loss; the optimizer of the fit stopped early (see besiroglu)",
    source="Hoffmann et al. 2022, arXiv:2203.15556, values from its TeX source",
    traps=("the refit `besiroglu` describes the same runs better",),
)

LAWS = (
    HOFFMANN,
    replace(
        HOFFMANN,
        id="hoffmann_rounded",
        name="Chinchilla, approach 3, rounded as printed",
        coefficients={"E0": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
        intervals={"beta / (alpha + beta)": (0.454, 0.455), "alpha / (alpha + beta)": (0.542, 0.543)},
        level="10 to 90 % as published, far too narrow to be right (see besiroglu)",
        source="Hoffmann et al. 2022, arXiv:2203.15556, eq. 10",
        traps=(
            "the rounding of beta (0.28 for 0.2849) changes the data term by 13 % at 1e11 tokens: use hoffmann_tex or besiroglu",
            "it implies 93 tokens per parameter at 5.88e23 FLOPs, not 20",
        ),
    ),
    replace(
        HOFFMANN,
        id="besiroglu",
        name="Chinchilla, approach 3, refitted by Epoch AI",
        coefficients={"E0": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
        intervals={
            "E0": (1.769, 1.871),
            "A": (285.214, 743.626),
            "B": (1042.357, 5810.344),
            "alpha": (0.317, 0.373),
            "beta": (0.331, 0.415),
        },
        level="95 % bootstrap",
        fitted={"n_params": (44e6, 16e9), "tokens": (8.2e8, 3.2e11)},
        setup="240 of 245 points read off a figure of Hoffmann et al., the 5 of fewest tokens per parameter dropped; tokens = "
        "C / (6 N) of those points. Huber loss with delta 1e-3, summed, BFGS, 4000 bootstraps",
        source="Besiroglu et al. 2024, arXiv:2404.10102",
        traps=(
            "the notebook of the fit prints E0 = 1.81686, the paper 1.8172",
            "the intervals of A and B are wide because the coefficients are correlated: never vary one alone",
        ),
    ),
    Law(
        id="muennighoff",
        name="Data-constrained scaling",
        kind="loss",
        formula="G = (alpha * A / (beta * B))**(1 / (alpha + beta)); U_N = min(N, (U * G)**(beta / alpha) * G); "
        "R_N = max(N / U_N - 1, 0); R_D = max(D / U - 1, 0); N_worth = U_N + U_N * R_Nstar * (1 - exp(-R_N / R_Nstar)); "
        "D_worth = U + U * R_Dstar * (1 - exp(-R_D / R_Dstar)); loss = E0 + A * N_worth**-alpha + B * D_worth**-beta",
        function=muennighoff,
        inputs=(
            N_TOTAL,
            replace(D, means="tokens trained on, repeats included"),
            Input("U", "tokens", "unique tokens", "all tokens are taken as unique, one epoch (U = D)"),
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
        fitted={"n_params": (7e6, 9e9), "tokens": (1e8, 9e11)},
        conditions={"schedule": "cosine", "optimizer": "Adam", "data": "C4 and OSCAR", "epochs": "1 to 500"},
        setup="alpha = beta imposed; coefficients from 54 runs of one epoch, the two R from 182 runs",
        source="Muennighoff et al. 2023, arXiv:2305.16264; coefficients from the datablations repository",
        traps=(
            "R counts repeats, epochs less one",
            "runs that more epochs made worse were left out of the fit: the law cannot foresee overfitting",
        ),
    ),
    Law(
        id="gadre_loss_c4",
        name="Over-training, trained and evaluated on C4",
        kind="loss",
        formula="M = D / N; C = 6 * N * D; loss = E0 + (a * M**eta + b * M**-eta) * C**-eta",
        function=gadre,
        inputs=(N_TOTAL, D),
        gives=("loss",),
        coefficients={"E0": 1.50826054441, "a": 141.277255297, "b": 189.515521496, "eta": 0.121236119638},
        fitted={"n_params": (10.6e6, 410e6), "tokens_per_param": (5, 640)},
        validated={"n_params": 6.9e9},
        conditions={
            "schedule": "cosine, 2000 steps of warmup",
            "optimizer": "AdamW, lr 3e-3, weight decay 0.033, 512 sequences of 2048 (varies with size)",
            "data": "C4, GPT-NeoX tokenizer",
        },
        setup="5 points: four small models at 20 tokens per parameter, the smallest (11e6) also at 320; checked on 6.9e9 parameters",
        source="Gadre et al. 2024, arXiv:2403.08540; refitted from its released code and data",
        traps=(
            "its repository fits A * N**-(2 * eta) + B * 6**-eta * D**-(2 * eta) above E0: a here is A * 6**eta, and b is B",
            "eta is half the exponent of N and of D",
            "the level depends on the evaluation set: other sets change the coefficients several-fold",
        ),
    ),
)
