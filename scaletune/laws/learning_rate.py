"""Published laws of the learning rate, with or without a batch size beside it."""

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
    """`steplaw` with its prefactors as intercepts of the log-log regression    arXiv:2503.04715, released fits."""
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
    """lr = c0 + c1 ln N, which turns negative    arXiv:2001.08361, appendix D.6."""
    return {"lr": c0 + c1 * math.log(N)}


def by_loss(L: float, *, lam: float, alpha: float) -> dict[str, float]:
    """lr = lam L^-alpha    Table 1 of arXiv:2503.04715."""
    return {"lr": lam * L**-alpha}


STEPLAW = Law(
    id="steplaw_lr_bs",
    name="Step Law (Predictable Scale I), coefficients rounded as published",
    kind="learning_rate",
    formula="lr = c_lr * N**a_N * D**a_D; batch_tokens = c_bs * D**b_D",
    function=steplaw,
    inputs=(
        replace(
            N_BODY,
            means=f"{N_BODY.means}; of a mixture of experts: all experts, not the active ones",
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
        "schedule": "2000 steps of warmup, then cosine to a fixed floor of 1e-5",
        "optimizer": "AdamW",
        "parametrization": "standard",
        "sequences": "2048 tokens",
    },
    setup="1911 dense runs in 17 cells of (N, D), lr on a grid of factors 2 or sqrt(2); fitted to all runs within 0.25 % of their "
    "cell's lowest loss. 708 mixture-of-experts runs at N = 2.15e9 with 9 to 58 % active",
    source="Li et al. 2025, arXiv:2503.04715",
    traps=(
        "the batch is in tokens; the released table counts sequences of 2048",
        "N with the vocabulary in it makes lr too low",
        "lr rises with D, the batch growing with it; Björck et al. find that it falls, at a fixed batch. That is a disagreement and not "
        "only the batch: to reconcile them lr would have to grow as batch^1.1",
        "the final lr is 1e-5 whatever the peak; with a floor tied to the peak the optimum moves",
        "the released dense runs alone do not give these exponents back (the same recipe gives -0.766, +0.197 and 0.613); "
        "the law still lands within 0.31 % of every cell's lowest loss, 0.07 % in the median",
    ),
    cautions=(
        "the band is a typical width put around the point, not measured at this scale: in the 17 released cells, runs within "
        "0.25 % of the lowest loss span a median factor of 2 in lr (1.4 to 4) and 2 in batch_tokens",
    ),
)

LAWS = (
    STEPLAW,
    replace(
        STEPLAW,
        id="steplaw_lr_bs_bootstrap",
        name="Step Law, mean of its 1000 released bootstrap fits",
        formula="lr = exp(i_lr + a_N * log(N) + a_D * log(D)); batch_tokens = exp(i_bs + b_D * log(D))",
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
        source="Li et al. 2025, arXiv:2503.04715; coefficients from the table of fits in its repository, step-law/steplaw",
        traps=(
            *STEPLAW.traps,
            "about 2 % from the rounded law in lr: intercept and exponents are strongly correlated, so vary them together or not at all",
        ),
    ),
    Law(
        id="deepseek_lr_bs",
        name="DeepSeek LLM",
        kind="learning_rate",
        formula="lr = c_lr * C**a; batch_tokens = c_bs * C**b",
        function=by_compute,
        inputs=(
            replace(
                C_MD,
                mismatch=f"{C_MD.mismatch}, lr 1 to 10 % lower and batch_tokens 3 to 32 % larger",
            ),
        ),
        gives=("lr", "batch_tokens"),
        coefficients={"c_lr": 0.3118, "a": -0.125, "c_bs": 0.292, "b": 0.3271},
        fitted={"flops": (1e17, 2e19)},
        validated={"flops": 1e20},
        conditions={
            "schedule": "2000 steps of warmup, then lr in steps: x0.316 after 80 % of the tokens, x0.1 after 90 %",
            "optimizer": "AdamW, betas 0.9 and 0.95, weight decay 0.1",
            "parametrization": "standard",
            "used at": "8.5e22 (7B) and 9.9e23 FLOPs (67B) by its authors",
        },
        setup="fitted to the runs within 0.25 % of the lowest generalization error at each C",
        source="DeepSeek-AI 2024, arXiv:2401.02954, eq. 1",
        traps=(
            "the prefactor is 0.3118; Table 1 of the Step Law paper misquotes it as 0.3188",
            "C is neither 6ND with all parameters nor without embeddings: 6N/M lies between 0.43 and 0.92",
        ),
    ),
    Law(
        id="bjorck_lr",
        name="Björck et al., over token horizons",
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
        setup="the batch is the same in all runs, so the exponent of D holds no growth of the batch",
        source="Björck et al. 2024, arXiv:2409.19913",
        traps=(
            "N and D are in billions; with raw counts the prefactor is 138.14",
            "Table 1 of the Step Law paper prints it as 1.3192e-5 * N**-0.23 * D**-0.32, which gives 3.4e-11 at 1B and 100B",
        ),
        unconfirmed=("the range of tokens, 25e9 to 800e9",),
    ),
    Law(
        id="porian_lr_bs",
        name="Porian et al., resolving Kaplan and Chinchilla",
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
            "optimizer": "AdamW, beta2 tuned among 0.95, 0.99 and 0.999; batches up to 128 sequences need 0.99",
            "parametrization": "standard",
            "data": "RefinedWeb",
        },
        setup="optimum interpolated over lr, then over the batch, at 20 tokens per parameter; checked at 220e6 to 900e6",
        source="Porian et al. 2024, arXiv:2406.19146, section 3 and appendix",
        traps=(
            "the prefactor 0.7576 is in tokens; the same law circulates as 0.00037 in sequences of 2048",
        ),
    ),
    Law(
        id="kaplan_lr",
        name="Kaplan et al., rule of thumb",
        kind="learning_rate",
        formula="lr = c0 + c1 * log(N)",
        function=kaplan,
        inputs=(N_BODY,),
        gives=("lr",),
        coefficients={"c0": 0.003239, "c1": -0.0001395},
        fitted={"n_params": (0.0, 1e9)},
        held={"batch_tokens": 524288},
        conditions={"schedule": "3000 steps of warmup, then cosine", "optimizer": "Adam"},
        setup="a rule of thumb; the logarithm is natural",
        source="Kaplan et al. 2020, arXiv:2001.08361, appendix D.6",
        traps=("lr is zero at N = 1.2126e10 and negative beyond: there is no answer there",),
    ),
    Law(
        id="meituan_lr",
        name="lr against loss, the form alone",
        kind="learning_rate",
        formula="lr = lam * L**-alpha",
        function=by_loss,
        inputs=(L,),
        gives=("lr",),
        unknown={"lam": "the prefactor", "alpha": "the exponent of the loss"},
        setup="known as a row of a comparison of laws, which prints no constants",
        shown_at={"L": 2, "lam": 0.008, "alpha": 3},
        source="Table 1 of arXiv:2503.04715, which lists the form; the paper it stands for may be arXiv:2412.01505",
    ),
)
