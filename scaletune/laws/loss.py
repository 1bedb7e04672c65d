"""Published laws of the loss in N and D, in nats per token.

Data and tokenizers differ between laws, so compare exponents, not levels.
"""

from __future__ import annotations

from dataclasses import replace

from scaletune.laws.entry import Law
from scaletune.laws.symbols import N_BODY, N_TOTAL, N_UNSTATED, D


def chinchilla(
    N: float, D: float, *, E0: float, A: float, B: float, alpha: float, beta: float
) -> dict[str, float]:
    """L = E0 + A N^-alpha + B D^-beta    arXiv:2203.15556, eq. 10."""
    return {"loss": E0 + A * N**-alpha + B * D**-beta}


def in_millions(
    N: float, D: float, *, E0: float, A: float, B: float, alpha: float, beta: float
) -> dict[str, float]:
    """`chinchilla` with N in millions and D in billions    arXiv:2602.10300, code."""
    return chinchilla(N / 1e6, D / 1e9, E0=E0, A=A, B=B, alpha=alpha, beta=beta)


HOFFMANN = Law(
    id="hoffmann_tex",
    name="Chinchilla, approach 3, unrounded coefficients",
    summary="Predicts the loss from model size and tokens.",
    kind="loss",
    formula="loss = E0 + A * N**-alpha + B * D**-beta",
    function=chinchilla,
    inputs=(N_TOTAL, D),
    gives=("loss",),
    coefficients={
        "E0": 1.693373681,
        "A": 406.401017519,
        "B": 410.722826945,
        "alpha": 0.33917084,
        "beta": 0.2849083,
    },
    fitted={"n_params_total": (70e6, 16e9), "tokens": (5e9, 500e9)},
    conditions={
        "schedule": "cosine over the whole run, down to a tenth of the peak",
        "optimizer": "AdamW",
        "parametrization": "standard",
        "data": "MassiveText",
    },
    setup=(
        "Huber loss with delta 1e-3 on log loss. The optimizer of the fit stopped "
        "early (see besiroglu)."
    ),
    source="Hoffmann et al. 2022, arXiv:2203.15556, values from its TeX source",
    caveats=("The refit `besiroglu` describes the same runs better",),
)

BESIROGLU = replace(
    HOFFMANN,
    id="besiroglu",
    name="Chinchilla, approach 3, refitted by Epoch AI",
    summary=(
        "Predicts the loss from model size and tokens, with a corrected fit of Chinchilla's runs."
    ),
    coefficients={"E0": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    intervals={
        "E0": (1.769, 1.871),
        "A": (285.214, 743.626),
        "B": (1042.357, 5810.344),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    },
    level="95 % bootstrap",
    fitted={"n_params_total": (44e6, 16e9), "tokens": (8.2e8, 3.2e11)},
    setup=(
        "240 of 245 points read from a figure of Hoffmann et al.; the 5 points with "
        "the fewest tokens per parameter are dropped. Tokens are C / (6 N). Huber loss "
        "with delta 1e-3, summed, BFGS, 4000 bootstraps."
    ),
    source="Besiroglu et al. 2024, arXiv:2404.10102",
    caveats=(
        "The notebook of the fit prints E0 = 1.81686, the paper 1.8172",
        (
            "The intervals of A and B are wide because the coefficients are correlated: "
            "never vary one alone"
        ),
    ),
)

GEMSTONES = Law(
    id="gemstones_hot",
    name="Gemstones, approach 3, before lr decay",
    summary="Predicts the loss at constant lr from model size and tokens.",
    kind="loss",
    formula=HOFFMANN.formula,
    function=chinchilla,
    inputs=(N_TOTAL, D),
    gives=("loss",),
    coefficients={
        "E0": 2.15182606431,
        "A": 234.510143168,
        "B": 3178671.92826,
        "alpha": 0.2989180518,
        "beta": 0.6928331414,
    },
    fitted={
        "n_params_total": (50e6, 2e9),
        "tokens": (2e9, 350e9),
        "width": (256, 3072),
        "depth": (3, 80),
    },
    conditions={"schedule": "constant", "data": "Dolma"},
    setup="Huber loss with delta 1e-4, from a grid of starting points.",
    source="McLeish et al. 2025, arXiv:2502.06857; the fits of its repository",
    caveats=(
        "The released files contain logarithms of A, B and E0",
        (
            "For the optimal N, the same runs give an exponent of 0.70 with this law and "
            "0.50 with gemstones_approach1, which shows how fragile such fits are"
        ),
    ),
)

NCPL = Law(
    id="ncpl_baseline_steplaw",
    name="Baseline of a learned predictor, Step Law runs",
    summary="Predicts the average loss of the Step Law sweeps from model size and tokens.",
    kind="loss",
    formula="loss = E0 + A * (N / 1e6)**-alpha + B * (D / 1e9)**-beta",
    function=in_millions,
    inputs=(N_BODY, D),
    gives=("loss",),
    coefficients={
        "E0": 1.21228882121,
        "A": 1.85240120191,
        "B": 0.730826108107,
        "alpha": 0.125764804555,
        "beta": 0.333738955397,
    },
    setup="A neural network predicts the residuals of this law.",
    source="arXiv:2602.10300; the code of its repository",
    caveats=(
        (
            "Fitted to all runs of the sweeps, including badly tuned ones: the law is not "
            "the lowest loss"
        ),
    ),
    warnings=(
        "No source states that N is in millions and D in billions; only these units fit the runs",
    ),
)

LAWS = (
    HOFFMANN,
    replace(
        HOFFMANN,
        id="hoffmann_rounded",
        name="Chinchilla, approach 3, rounded as printed",
        summary=(
            "Predicts the loss from model size and tokens, with the rounded coefficients "
            "of the paper."
        ),
        coefficients={"E0": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
        intervals={
            "beta / (alpha + beta)": (0.454, 0.455),
            "alpha / (alpha + beta)": (0.542, 0.543),
        },
        level="10 to 90 % as published; far too narrow to be right (see besiroglu)",
        source="Hoffmann et al. 2022, arXiv:2203.15556, eq. 10",
        caveats=(
            (
                "Rounding beta (0.28 for 0.2849) changes the data term by 13 % at 1e11 tokens: "
                "use hoffmann_tex or besiroglu"
            ),
            "The rounded law implies 93 tokens per parameter at 5.88e23 FLOPs, not 20",
        ),
    ),
    BESIROGLU,
    Law(
        id="sardana_fit",
        name="Beyond Chinchilla: loss up to 10000 tokens per parameter",
        summary=(
            "Predicts the loss from model size and tokens, for up to 10000 tokens per parameter."
        ),
        kind="loss",
        formula=HOFFMANN.formula,
        function=chinchilla,
        inputs=(N_UNSTATED, D),
        gives=("loss",),
        coefficients={"E0": 1.45, "A": 33.66, "B": 138.9, "alpha": 0.18, "beta": 0.24},
        fitted={"n_params": (150e6, 6e9), "tokens_per_param": (10, 10000)},
        setup=(
            "Fitted to all runs. The runs with at most 100 tokens per parameter alone give "
            "E0 = 0.17, A = 7.199, B = 25.97, alpha = 0.08 and beta = 0.13."
        ),
        source="Sardana et al. 2024, arXiv:2401.00448, Table 1",
        caveats=(
            (
                "The coefficients change with the longest runs in the fit: the form does not "
                "hold over four decades"
            ),
        ),
    ),
    GEMSTONES,
    replace(
        GEMSTONES,
        id="gemstones_hot_100bp",
        name="Gemstones, approach 3, before lr decay, beyond 100e9 tokens",
        summary=(
            "Predicts the loss at constant lr from model size and tokens, for runs beyond "
            "100e9 tokens."
        ),
        coefficients={
            "E0": 1.94550713641,
            "A": 131.12839854,
            "B": 327225.918404,
            "alpha": 0.2575546364,
            "beta": 0.5909317455,
        },
    ),
    replace(
        GEMSTONES,
        id="gemstones_cool_end",
        name="Gemstones, approach 3, after the cooldown",
        summary="Predicts the loss after the cooldown from model size and tokens.",
        coefficients={
            "E0": 2.10831479875,
            "A": 213.320602495,
            "B": 3178016.28641,
            "alpha": 0.2970133066,
            "beta": 0.6903991635,
        },
        conditions=GEMSTONES.conditions
        | {"schedule": "constant, then a cooldown; models with 0.1e9 to 2e9 parameters"},
    ),
    Law(
        id="krajewski_dense",
        name="Fine-grained experts: loss of the dense baseline",
        summary="Predicts the loss of dense models from model size and tokens.",
        kind="loss",
        formula=HOFFMANN.formula,
        function=chinchilla,
        inputs=(N_BODY, D),
        gives=("loss",),
        coefficients={"E0": 0.47, "A": 16.3, "B": 26.7, "alpha": 0.126, "beta": 0.127},
        fitted={"n_params": (129e6, 3.7e9), "tokens": (16e9, 130e9)},
        conditions={"data": "C4"},
        setup="The dense baseline of krajewski_moe.",
        source="Krajewski et al. 2024, arXiv:2402.07871, Table 1",
    ),
    NCPL,
    replace(
        NCPL,
        id="ncpl_baseline_marin",
        name="Baseline of a learned predictor, Marin runs",
        summary="Predicts the average loss of the Marin runs from model size and tokens.",
        inputs=(N_UNSTATED, D),
        coefficients={
            "E0": 2.28141652875,
            "A": 3.99794182444,
            "B": 0.825145632945,
            "alpha": 0.441741384329,
            "beta": 0.16764510542,
        },
    ),
)
