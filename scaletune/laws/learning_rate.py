"""Published laws of the optimal learning rate, some with an optimal batch size."""

from __future__ import annotations

import math
from dataclasses import replace

from scaletune.laws.entry import Law
from scaletune.laws.symbols import C_MD, N_BODY, N_UNSTATED, N_WITH_HEAD, D, L


def steplaw(
    N: float, D: float, *, c_lr: float, a_N: float, a_D: float, c_bs: float, b_D: float
) -> dict[str, float]:
    """lr = c_lr N^a_N D^a_D, batch = c_bs D^b_D    arXiv:2503.04715."""
    return {"lr": c_lr * N**a_N * D**a_D, "batch_tokens": c_bs * D**b_D}


def steplaw_in_logs(
    N: float, D: float, *, i_lr: float, a_N: float, a_D: float, i_bs: float, b_D: float
) -> dict[str, float]:
    """`steplaw` with intercepts of log-log regression as prefactors    arXiv:2503.04715, code."""
    return steplaw(N, D, c_lr=math.exp(i_lr), a_N=a_N, a_D=a_D, c_bs=math.exp(i_bs), b_D=b_D)


def by_compute(C: float, *, c_lr: float, a: float, c_bs: float, b: float) -> dict[str, float]:
    """lr = c_lr C^a, batch = c_bs C^b    arXiv:2401.02954, eq. 1."""
    return {"lr": c_lr * C**a, "batch_tokens": c_bs * C**b}


def by_size(N: float, *, c_lr: float, a: float, c_bs: float, b: float) -> dict[str, float]:
    """lr = c_lr N^a, batch = c_bs N^b    arXiv:2406.19146, section 3."""
    return {"lr": c_lr * N**a, "batch_tokens": c_bs * N**b}


def bjorck(N: float, D: float, *, c: float, a: float, b: float) -> dict[str, float]:
    """lr = c (N/1e9)^-a (D/1e9)^-b, at a fixed batch    arXiv:2409.19913."""
    return {"lr": c * (N / 1e9) ** -a * (D / 1e9) ** -b}


def kaplan(N: float, *, c0: float, c1: float) -> dict[str, float]:
    """lr = c0 + c1 ln N, which becomes negative for large N    arXiv:2001.08361, appendix D.6."""
    return {"lr": c0 + c1 * math.log(N)}


def by_loss(L: float, *, lam: float, alpha: float) -> dict[str, float]:
    """lr = lam L^-alpha    Table 1 of arXiv:2503.04715."""
    return {"lr": lam * L**-alpha}


STEPLAW = Law(
    id="steplaw_lr_bs",
    name="Step Law (Predictable Scale I), coefficients rounded as published",
    summary="Predicts the optimal peak lr and batch size from model size and tokens.",
    kind="learning_rate",
    formula="lr = c_lr * N**a_N * D**a_D; batch_tokens = c_bs * D**b_D",
    function=steplaw,
    inputs=(
        replace(
            N_BODY,
            means=f"{N_BODY.means}; of a mixture of experts: all experts, not only active ones",
        ),
        D,
    ),
    gives=("lr", "batch_tokens"),
    coefficients={"c_lr": 1.79, "a_N": -0.713, "a_D": 0.307, "c_bs": 0.58, "b_D": 0.571},
    fitted={
        "n_params": (214.7e6, 1073.7e6),
        "tokens": (4e9, 1e11),
        "tokens_per_param": (18.6, 466),
        "lr": (0.000244, 0.0221),
        "batch_tokens": (16 * 2048, 2048 * 2048),
    },
    band={"lr": 2.0, "batch_tokens": 2.0},
    conditions={
        "schedule": "2000 steps of warmup, then cosine to a fixed final lr of 1e-5",
        "optimizer": "AdamW",
        "parametrization": "standard",
        "sequences": "2048 tokens",
    },
    setup=(
        "1911 dense runs in 17 settings of (N, D), with lr on a grid of factors 2 or "
        "sqrt(2). The law is fitted to all runs within 0.25 % of the lowest loss of "
        "their setting. There are also 708 mixture-of-experts runs at N = 2.15e9 with "
        "9 to 58 % of the parameters active."
    ),
    source="Li et al. 2025, arXiv:2503.04715",
    caveats=(
        "The batch size is in tokens; the released table counts sequences of 2048 tokens",
        "If N includes the vocabulary, the predicted lr is too low",
        (
            "lr rises with D, while the batch size grows with D. Björck et al. find that "
            "lr falls with D at a fixed batch size. The batch size alone does not explain "
            "this disagreement: lr would have to grow as batch^1.1"
        ),
        (
            "The final lr is 1e-5 for every peak lr; if the final lr is a fraction of the "
            "peak, the optimum moves"
        ),
        (
            "The released dense runs alone do not reproduce these exponents (the same "
            "procedure gives -0.766, +0.197 and 0.613). The law is still within 0.31 % of "
            "the lowest loss in every setting, 0.07 % in the median"
        ),
    ),
    warnings=(
        (
            "The near-optimal band is a typical width, not measured at this scale: in the "
            "17 released settings, runs within 0.25 % of the lowest loss span a median "
            "factor of 2 in lr (1.4 to 4) and 2 in batch_tokens"
        ),
    ),
)

LAWS = (
    STEPLAW,
    replace(
        STEPLAW,
        id="steplaw_lr_bs_bootstrap",
        name="Step Law, mean of its 1000 released bootstrap fits",
        summary=(
            "Predicts the optimal peak lr and batch size from model size and tokens, with "
            "bootstrap intervals of the coefficients."
        ),
        formula=(
            "lr = exp(i_lr + a_N * log(N) + a_D * log(D)); batch_tokens = exp(i_bs + b_D * log(D))"
        ),
        function=steplaw_in_logs,
        coefficients={
            "i_lr": 0.58630779074,
            "a_N": -0.712922291187,
            "a_D": 0.307490950412,
            "i_bs": -0.54354217361,
            "b_D": 0.57094436469,
        },
        intervals={
            "i_lr": (-0.647889775808, 1.76479321989),
            "a_N": (-0.774404130636, -0.655372365139),
            "a_D": (0.271247104875, 0.345103884107),
            "i_bs": (-1.35649655794, 0.321709823569),
            "b_D": (0.534032410802, 0.605507840114),
        },
        level="2.5 to 97.5 % of 1000 bootstraps",
        source=(
            "Li et al. 2025, arXiv:2503.04715; coefficients from the table of fits in its "
            "repository, step-law/steplaw"
        ),
        caveats=(
            *STEPLAW.caveats,
            (
                "lr differs from the rounded law by about 2 %. Intercept and exponents are "
                "strongly correlated: vary them together or not at all"
            ),
        ),
    ),
    Law(
        id="deepseek_lr_bs",
        name="DeepSeek LLM: lr and batch size from compute",
        summary="Predicts the optimal peak lr and batch size from compute.",
        kind="learning_rate",
        formula="lr = c_lr * C**a; batch_tokens = c_bs * C**b",
        function=by_compute,
        inputs=(
            replace(
                C_MD,
                mismatch=(
                    f"{C_MD.mismatch}; with that C, lr is 1 to 10 % lower and batch_tokens 3 to "
                    "32 % larger"
                ),
            ),
        ),
        gives=("lr", "batch_tokens"),
        coefficients={"c_lr": 0.3118, "a": -0.125, "c_bs": 0.292, "b": 0.3271},
        fitted={"flops": (1e17, 2e19)},
        validated={"flops": 1e20},
        conditions={
            "schedule": (
                "2000 steps of warmup, then lr in steps: x0.316 after 80 % of the tokens, x0.1 "
                "after 90 %"
            ),
            "optimizer": "AdamW, betas 0.9 and 0.95, weight decay 0.1",
            "parametrization": "standard",
            "used at": "8.5e22 FLOPs (7B) and 9.9e23 FLOPs (67B) by its authors",
        },
        setup="Fitted to the runs within 0.25 % of the lowest generalization error at each C.",
        source="DeepSeek-AI 2024, arXiv:2401.02954, eq. 1",
        caveats=(
            "The prefactor is 0.3118; Table 1 of the Step Law paper misquotes it as 0.3188",
            (
                "C is not 6ND, neither with all parameters nor without embeddings: 6N/M lies "
                "between 0.43 and 0.92"
            ),
        ),
    ),
    Law(
        id="bjorck_lr",
        name="Björck et al.: lr over token horizons",
        summary="Predicts the optimal peak lr from model size and tokens, at a fixed batch size.",
        kind="learning_rate",
        formula="lr = c * (N / 1e9)**-a * (D / 1e9)**-b",
        function=bjorck,
        inputs=(N_UNSTATED, D),
        gives=("lr",),
        coefficients={"c": 0.00155, "a": 0.23, "b": 0.32},
        fitted={"n_params": (50e6, 2.7e9), "tokens": (25e9, 800e9)},
        held={"batch_tokens": 0.5e6},
        conditions={
            "schedule": "cosine",
            "optimizer": "AdamW",
            "parametrization": "standard; the same trend in D under muP",
        },
        setup=(
            "All runs have the same batch size, so the exponent of D contains no effect of "
            "batch size growth."
        ),
        source="Björck et al. 2024, arXiv:2409.19913",
        caveats=(
            "N and D are in billions; with raw counts the prefactor is 138.14",
            (
                "Table 1 of the Step Law paper prints this law as 1.3192e-5 * N**-0.23 * "
                "D**-0.32, which gives 3.4e-11 at 1B parameters and 100B tokens"
            ),
        ),
        unconfirmed=("the range of tokens, 25e9 to 800e9",),
    ),
    Law(
        id="porian_lr_bs",
        name="Porian et al.: lr and batch size from model size",
        summary=(
            "Predicts the optimal lr and batch size from model size, at 20 tokens per parameter."
        ),
        kind="learning_rate",
        formula="lr = c_lr * N**a; batch_tokens = c_bs * N**b",
        function=by_size,
        inputs=(N_WITH_HEAD,),
        gives=("lr", "batch_tokens"),
        coefficients={"c_lr": 3.7, "a": -0.36, "c_bs": 0.7576, "b": 0.703},
        fitted={"n_params": (25e6, 110e6)},
        validated={"n_params": 900e6},
        held={"tokens_per_param": 20},
        conditions={
            "schedule": "constant after a short warmup",
            "optimizer": (
                "AdamW, beta2 tuned among 0.95, 0.99 and 0.999; batches up to 128 sequences "
                "need 0.99"
            ),
            "parametrization": "standard",
            "data": "RefinedWeb",
        },
        setup=(
            "The optimum is interpolated over lr, then over batch size, at 20 tokens per "
            "parameter. It is validated at 220e6 to 900e6 parameters."
        ),
        source="Porian et al. 2024, arXiv:2406.19146, section 3 and appendix",
        caveats=(
            (
                "The prefactor 0.7576 is in tokens; the same law is also quoted with 0.00037, "
                "in sequences of 2048 tokens"
            ),
        ),
    ),
    Law(
        id="kaplan_lr",
        name="Kaplan et al.: rule of thumb for lr",
        summary="Predicts the peak lr from model size.",
        kind="learning_rate",
        formula="lr = c0 + c1 * log(N)",
        function=kaplan,
        inputs=(N_BODY,),
        gives=("lr",),
        coefficients={"c0": 0.003239, "c1": -0.0001395},
        fitted={"n_params": (0.0, 1e9)},
        held={"batch_tokens": 524288},
        conditions={"schedule": "3000 steps of warmup, then cosine", "optimizer": "Adam"},
        setup="A rule of thumb. The logarithm is natural.",
        source="Kaplan et al. 2020, arXiv:2001.08361, appendix D.6",
        caveats=("lr is zero at N = 1.2126e10 and negative beyond; the law gives no lr there",),
    ),
    Law(
        id="meituan_lr",
        name="lr from the loss (functional form only)",
        summary="Gives the optimal lr as a power of the loss, without published coefficients.",
        kind="learning_rate",
        formula="lr = lam * L**-alpha",
        function=by_loss,
        inputs=(L,),
        gives=("lr",),
        unknown={"lam": "prefactor", "alpha": "exponent of the loss"},
        setup="Known only as a row in a comparison of laws that prints no constants.",
        shown_at={"L": 2, "lam": 0.008, "alpha": 3},
        source=(
            "Table 1 of arXiv:2503.04715, which lists the form; the original paper may be "
            "arXiv:2412.01505"
        ),
    ),
)
