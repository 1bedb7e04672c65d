"""Published laws of compute-optimal allocation: parameters and tokens as powers of compute."""

from __future__ import annotations

import math
from dataclasses import replace

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import C_6ND_TOTAL, C_MD, C_PF, C_UNSTATED, PF_DAY

C_HEAD = Input(
    "C",
    "flops",
    "training FLOPs 6 N D, where N includes the output head",
    "in this law, N includes the output head",
)
C_ACTIVE = Input(
    "C",
    "flops",
    "training FLOPs M * D, where M (FLOPs per token) counts active experts and no embedding",
    "this law counts the FLOPs per token of the active experts, not parameters",
)
C_EXACT = Input(
    "C",
    "flops",
    "training FLOPs, counted operation by operation (grouped-query attention included)",
    "this law counts FLOPs exactly, not as 6 N D",
)


def by_flops_per_token(C: float, *, m0: float, a: float, d0: float, b: float) -> dict[str, float]:
    """M = m0 C^a, D = d0 C^b, with C = M D    arXiv:2401.02954, eq. 4."""
    return {"flops_per_token": m0 * C**a, "tokens_opt": d0 * C**b}


def by_params(C: float, *, c: float, a: float) -> dict[str, float]:
    """N = c C^a, D = C / (6 N)    arXiv:2406.19146."""
    N = c * C**a
    return {"n_params_opt": N, "tokens_opt": C / (6 * N)}


def by_tokens(C: float, *, A: float, alpha: float) -> dict[str, float]:
    """D = A C^alpha, N = C / (6 D)    arXiv:2407.21783."""
    D = A * C**alpha
    return {"n_params_opt": C / (6 * D), "tokens_opt": D}


def by_ratio(C: float, *, K2: float, eta: float) -> dict[str, float]:
    """N/D = K2 (C/6e18)^eta    arXiv:2404.06395, section 4."""
    ratio = K2 * (C / 6e18) ** eta
    return {
        "tokens_per_param": 1 / ratio,
        "n_params_opt": math.sqrt(C / 6 * ratio),
        "tokens_opt": math.sqrt(C / 6 / ratio),
    }


def kaplan(
    C: float, *, c: float, a: float, alpha_S: float, alpha_B: float, alpha_N: float
) -> dict[str, float]:
    """N = c (C/PF-day)^a and the exponent of the loss over C    arXiv:2001.08361, eq. 1.7, 1.8.

    1/exponent = 1/alpha_S + 1/alpha_B + 1/alpha_N.
    """
    return {
        "n_params_opt": c * (C / PF_DAY) ** a,
        "exponent": 1 / (1 / alpha_S + 1 / alpha_B + 1 / alpha_N),
    }


def gemstones(C: float, *, iN: float, aN: float, iD: float, aD: float) -> dict[str, float]:
    """ln N = iN + aN ln C, ln D = iD + aD ln C    arXiv:2502.06857."""
    return {"n_params_opt": math.exp(iN) * C**aN, "tokens_opt": math.exp(iD) * C**aD}


DEEPSEEK = Law(
    id="deepseek_alloc",
    name="DeepSeek LLM: compute-optimal FLOPs per token and tokens",
    summary="Predicts the compute-optimal FLOPs per token and training tokens from compute.",
    kind="allocation",
    formula="flops_per_token = m0 * C**a; tokens_opt = d0 * C**b",
    function=by_flops_per_token,
    inputs=(C_MD,),
    gives=("flops_per_token", "tokens_opt"),
    coefficients={"m0": 0.1715, "a": 0.5243, "d0": 5.8316, "b": 0.4757},
    fitted={"flops": (1e17, 3e20)},
    setup=(
        "IsoFLOP fit over 8 budgets with about 10 splits each. The loss is bits per "
        "byte on 100e6 validation tokens."
    ),
    source="DeepSeek-AI 2024, arXiv:2401.02954, eq. 4",
    caveats=(
        (
            "The exponents depend on the data: 0.450 and 0.550 on early DeepSeek data, "
            "0.578 and 0.422 on OpenWebText2"
        ),
        "flops_per_token is not a parameter count; one sixth of it is close to one",
    ),
)

LING = replace(
    DEEPSEEK,
    id="ling_alloc_moe",
    name="Ling, mixture-of-experts models: compute-optimal FLOPs per token and tokens",
    summary=(
        "Predicts the compute-optimal FLOPs per token and training tokens of mixtures "
        "of experts from compute."
    ),
    inputs=(C_ACTIVE,),
    coefficients={"m0": 0.1915, "a": 0.5095, "d0": 5.2232, "b": 0.4905},
    fitted={"flops": (3e17, 3e20)},
    conditions={"model": "7.8 % of the experts active, granularity 2"},
    setup="Fitted on the same data as ling_alloc_dense.",
    source="Ling team 2025, arXiv:2507.17702, Table 1",
    caveats=(
        (
            "The paper defines M by one forward pass but calls M * D training compute, so "
            "C is uncertain by a factor of 3"
        ),
    ),
)

PORIAN = Law(
    id="porian_alloc_rw",
    name="Porian et al., RefinedWeb: allocation with hyperparameters tuned at every size",
    summary="Predicts the compute-optimal model size and tokens on RefinedWeb from compute.",
    kind="allocation",
    formula="n_params_opt = c * C**a; tokens_opt = C / (6 * n_params_opt)",
    function=by_params,
    inputs=(C_HEAD,),
    gives=("n_params_opt", "tokens_opt"),
    coefficients={"c": 0.118926483975, "a": 0.496895078179},
    intervals={"a": (0.4907, 0.5045)},
    level="95 % weighted bootstrap",
    fitted={"flops": (1.25e16, 2.56e19)},
    conditions={"schedule": "constant after a short warmup", "data": "RefinedWeb"},
    setup="IsoFLOP fit on validation loss, with lr, batch size and beta2 tuned.",
    source="Porian et al. 2024, arXiv:2406.19146; the released fits of its repository",
    caveats=(
        (
            "The same runs give a = 0.835 without the corrections for the FLOPs of the "
            "output head, the warmup and the tuning"
        ),
    ),
)

LAWS = (
    DEEPSEEK,
    LING,
    replace(
        LING,
        id="ling_alloc_dense",
        name="Ling, dense models: compute-optimal FLOPs per token and tokens",
        summary=(
            "Predicts the compute-optimal FLOPs per token and training tokens of dense "
            "models from compute."
        ),
        coefficients={"m0": 0.0655, "a": 0.5422, "d0": 15.2582, "b": 0.4578},
        conditions={"model": "dense"},
        setup="The dense baseline of ling_alloc_moe.",
    ),
    PORIAN,
    replace(
        PORIAN,
        id="porian_alloc_owt2",
        name="Porian et al., OpenWebText2: allocation with hyperparameters tuned at every size",
        summary=(
            "Predicts the compute-optimal model size and tokens on OpenWebText2 from compute."
        ),
        coefficients={"c": 0.0469353463105, "a": 0.518454205724},
        intervals={"a": (0.4931, 0.5414)},
        conditions=PORIAN.conditions | {"data": "OpenWebText2"},
    ),
    Law(
        id="hoffmann_alloc",
        name="Chinchilla, approach 1: allocation",
        summary=(
            "Predicts the compute-optimal model size and tokens from compute, with both "
            "growing as its square root."
        ),
        kind="allocation",
        formula="n_params_opt = c * C**a; tokens_opt = C / (6 * n_params_opt)",
        function=by_params,
        inputs=(C_6ND_TOTAL,),
        gives=("n_params_opt", "tokens_opt"),
        coefficients={"c": 0.0909, "a": 0.5},
        intervals={
            "a": (0.488, 0.502),
            "1 - a": (0.501, 0.512),
            "a of approach 2": (0.462, 0.534),
            "1 - a of approach 2": (0.483, 0.529),
        },
        level="10 to 90 %; approach 2 (isoFLOP) has a = 0.49",
        fitted={"flops": (6e18, 3e21)},
        conditions={"data": "MassiveText"},
        setup=(
            "Fitted to the lower envelope of training curves. Table 3 of the paper sets "
            "the prefactor here: 1.21e20 FLOPs are optimal for 1e9 parameters."
        ),
        source="Hoffmann et al. 2022, arXiv:2203.15556, Tables 2 and 3",
    ),
    Law(
        id="llama3_alloc",
        name="Llama 3: compute-optimal tokens",
        summary="Predicts the compute-optimal tokens and model size of Llama 3 from compute.",
        kind="allocation",
        formula="tokens_opt = A * C**alpha; n_params_opt = C / (6 * tokens_opt)",
        function=by_tokens,
        inputs=(C_UNSTATED,),
        gives=("n_params_opt", "tokens_opt"),
        coefficients={"A": 0.299, "alpha": 0.537},
        fitted={"flops": (6e18, 1e22)},
        setup=(
            "IsoFLOP fit. At 3.8e25 FLOPs the law gives 16.3e12 tokens and 389e9 "
            "parameters; the paper says 16.55e12 and 402e9."
        ),
        source=(
            "Grattafiori et al. 2024, arXiv:2407.21783, section 3.2.1; constants from the "
            "label of a figure"
        ),
        caveats=(
            "The paper calls the law N*(C), but it gives tokens",
            (
                "The rounded constants in the paper's text, 0.29 and 0.53, give only 10.5e12 "
                "tokens at 3.8e25 FLOPs"
            ),
        ),
    ),
    Law(
        id="minicpm_alloc",
        name="MiniCPM: compute-optimal tokens per parameter",
        summary=(
            "Predicts the compute-optimal tokens per parameter, model size and tokens from compute."
        ),
        kind="allocation",
        formula=(
            "ratio = K2 * (C / 6e18)**eta; tokens_per_param = 1 / ratio; n_params_opt = "
            "sqrt(C / 6 * ratio); tokens_opt = sqrt(C / 6 / ratio)"
        ),
        function=by_ratio,
        inputs=(C_UNSTATED,),
        gives=("tokens_per_param", "n_params_opt", "tokens_opt"),
        coefficients={"K2": 0.01, "eta": -0.1},
        fitted={"n_params": (40e6, 2e9)},
        conditions={
            "schedule": "WSD, decayed at 10 to 60 tokens per parameter",
            "parametrization": "muP",
        },
        setup=(
            "Six model sizes. The exponents of the loss per byte are 0.29 for N and 0.23 "
            "for D, averaged over 5 corpora."
        ),
        source="Hu et al. 2024, arXiv:2404.06395, section 4",
        caveats=("The printed exponents would give eta = -0.115, but the paper prints -0.10",),
        warnings=(
            (
                "It is inferred, not stated, that N and D are in billions: with raw FLOPs the "
                "law would give 10524 tokens per parameter at 1e21"
            ),
        ),
    ),
    Law(
        id="kaplan_alloc",
        name="Kaplan et al.: compute-optimal parameters",
        summary=(
            "Predicts the compute-optimal model size from compute, and the exponent of the "
            "loss over compute."
        ),
        kind="allocation",
        formula=(
            "n_params_opt = c * (C / 8.64e19)**a; exponent = 1 / (1 / alpha_S + 1 / "
            "alpha_B + 1 / alpha_N)"
        ),
        function=kaplan,
        inputs=(C_PF,),
        gives=("n_params_opt", "exponent"),
        coefficients={"c": 1.3e9, "a": 0.73, "alpha_S": 0.76, "alpha_B": 0.21, "alpha_N": 0.076},
        fitted={"n_params_opt": (768, 1.5e9)},
        conditions={
            "schedule": "3000 steps of warmup, then cosine to zero over 250000 steps",
            "batch": "524288 tokens",
            "data": "WebText2",
        },
        setup=(
            "Fitted to the compute-efficient frontier, which gives 0.73 and 0.050. The "
            "relation between the exponents would give a = 0.684 and an exponent of 0.052."
        ),
        source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.7 and 1.8",
        caveats=(
            (
                "The exponent 0.73 results from how parameters and FLOPs were counted, from "
                "the warmup and from untuned hyperparameters: see porian_alloc_rw"
            ),
        ),
    ),
    Law(
        id="gemstones_approach1",
        name="Gemstones, approach 1: allocation",
        summary=(
            "Predicts the compute-optimal model size and tokens from compute, by the lower "
            "hull of training curves."
        ),
        kind="allocation",
        formula="n_params_opt = exp(iN) * C**aN; tokens_opt = exp(iD) * C**aD",
        function=gemstones,
        inputs=(C_EXACT,),
        gives=("n_params_opt", "tokens_opt"),
        coefficients={
            "iN": -2.84510769608,
            "aN": 0.499380216083,
            "iD": 1.89632082733,
            "aD": 0.480988823213,
        },
        fitted={"flops": (1e19, 1e22)},
        conditions={"data": "Dolma"},
        setup="Log-log least squares on the lower hull of training curves.",
        source="McLeish et al. 2025, arXiv:2502.06857; the fits of its repository",
        caveats=(
            "The exponents sum to 0.98, because C is not 6 N D",
            "Approach 3 on the same runs gives an exponent of 0.70 for N (gemstones_hot)",
        ),
    ),
)
