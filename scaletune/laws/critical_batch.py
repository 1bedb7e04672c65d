"""Published laws of the critical batch size, above which larger batches save few steps."""

from __future__ import annotations

import math
from dataclasses import replace

from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import N_BODY, B, D, L

SEQ = 512  # tokens in Zhang et al.'s sequences


def by_loss(L: float, *, B_star: float, alpha_B: float) -> dict[str, float]:
    """B_crit = B* L^(-1/alpha_B)    arXiv:2001.08361, eq. 1.4."""
    return {"critical_batch_tokens": B_star / L ** (1 / alpha_B)}


def twenty_percent(B1: float, *, a: float, b: float) -> dict[str, float]:
    """1.2 B1 + 0.2 b/a, the closed form for steps S = a + b/B    arXiv:2410.21676."""
    return {"critical_batch_tokens": 1.2 * B1 + 0.2 * b / a}


def zhang_by_size(N: float, *, c: float, p: float) -> dict[str, float]:
    """512 c (N/1e6)^p    arXiv:2410.21676."""
    return {"critical_batch_tokens": SEQ * c * (N / 1e6) ** p}


def zhang_by_tokens(D: float, *, c: float, p: float) -> dict[str, float]:
    """512 c (D/1e6)^p    arXiv:2410.21676."""
    return zhang_by_size(D, c=c, p=p)


def tradeoff(S_min: float, D_min: float, B: float) -> dict[str, float]:
    """(S/S_min - 1) (D/D_min - 1) = 1 with B_crit = D_min/S_min    arXiv:1812.06162."""
    critical = D_min / S_min
    return {
        "steps": S_min * (1 + critical / B),
        "tokens": D_min * (1 + B / critical),
        "critical_batch_tokens": critical,
    }


def powerlines(D_min: float, *, c: float, p: float) -> dict[str, float]:
    """2048 c D_min^p    arXiv:2505.13738."""
    return {"critical_batch_tokens": 2048 * c * D_min**p}


def root(D: float, *, k: float) -> dict[str, float]:
    """k sqrt(D)    arXiv:2505.23971."""
    return {"critical_batch_tokens": k * math.sqrt(D)}


def regimes(D: float, *, k: float, k_opt: float) -> dict[str, float]:
    """B_crit = k D, B_opt = k_opt sqrt(D)    arXiv:2410.05838."""
    return {"critical_batch_tokens": k * D, "batch_tokens": k_opt * math.sqrt(D)}


KAPLAN = Law(
    id="kaplan_bcrit",
    name="Kaplan et al.: critical batch size from the loss",
    summary="Predicts the critical batch size from the loss.",
    kind="critical_batch",
    formula="critical_batch_tokens = B_star / L**(1 / alpha_B)",
    function=by_loss,
    inputs=(L,),
    gives=("critical_batch_tokens",),
    coefficients={"B_star": 2.1e8, "alpha_B": 0.21},
    fitted={"loss": (2.5, 6)},
    conditions={"data": "WebText2"},
    setup="Measured by the gradient noise scale. At a given loss it is the same for every N.",
    source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.4",
    caveats=(
        "The paper's text rounds B_star to 2e8; its table says 2.1e8",
        (
            "Table 1 of the Step Law paper prints 2e18 * L**-4.7619: the exponent is "
            "right, the prefactor is 1e10 times too large"
        ),
    ),
)

ZHANG = Law(
    id="zhang_cbs_N",
    name="Zhang et al.: critical batch size from model size, at 20 tokens per parameter",
    summary="Predicts the critical batch size from model size, at 20 tokens per parameter.",
    kind="critical_batch",
    formula="critical_batch_tokens = 512 * c * (N / 1e6)**p",
    function=zhang_by_size,
    inputs=(N_BODY,),
    gives=("critical_batch_tokens",),
    coefficients={"c": 93.1968140439, "p": 0.468278232813},
    fitted={"n_params": (85e6, 1.2e9)},
    held={"tokens_per_param": 20},
    conditions={
        "schedule": "constant, with weight averaging",
        "optimizer": "AdamW",
        "data": "C4",
        "sequences": "512 tokens",
    },
    setup=(
        "A log-log line through 5 sizes. The critical batch size is where the steps "
        "exceed linear scaling from 256 sequences by 20 %."
    ),
    source="Zhang et al. 2024, arXiv:2410.21676; the notebook of its repository",
    caveats=(
        "c * (N / 1e6)**p counts sequences of 512 tokens, with N in millions",
        "A fit without logarithms gives 99.51 * (N / 1e6)**0.4576",
    ),
)

LAWS = (
    KAPLAN,
    Law(
        id="zhang_cbs_def",
        name="Zhang et al.: definition of the critical batch size",
        summary="Computes the critical batch size from a fitted curve of steps over batch size.",
        kind="critical_batch",
        formula="critical_batch_tokens = 1.2 * B1 + 0.2 * b / a",
        function=twenty_percent,
        inputs=(
            Input(
                "B1",
                "base_batch_tokens",
                "reference batch size of linear scaling, in tokens; 256 sequences in the source",
            ),
        ),
        gives=("critical_batch_tokens",),
        unknown={
            "a": "steps at infinite batch size, in S = a + b / B",
            "b": (
                "tokens, in S = a + b / B; b / B is the number of steps that a larger batch "
                "can save"
            ),
        },
        conditions=ZHANG.conditions,
        setup=(
            "S = a + b / B is fitted to steps against batch size at one loss. The critical "
            "batch size needs 20 % more steps than linear scaling from B1."
        ),
        source=ZHANG.source,
        caveats=(
            (
                "The source counts sequences of 512 tokens; in tokens, B1 and b are 512 times "
                "as large"
            ),
            (
                "b / a is the critical batch size of mccandlish_tradeoff, with a = S_min and b "
                "= D_min"
            ),
        ),
        shown_at={"a": 1293.82686947, "b": 512 * 2834258.08887, "B1": 512 * 256},
    ),
    ZHANG,
    replace(
        ZHANG,
        id="zhang_cbs_D",
        name="Zhang et al.: critical batch size from tokens",
        summary="Predicts the critical batch size from training tokens.",
        formula="critical_batch_tokens = 512 * c * (D / 1e6)**p",
        function=zhang_by_tokens,
        inputs=(D,),
        coefficients={"c": 22.91, "p": 0.47},
        fitted={"tokens": (1.7e9, 24e9)},
        held={},
        setup=(
            "The paper finds that the critical batch size grows with D and hardly with N "
            "at fixed D. c is zhang_cbs_N at N = D / 20: 93.197 * 20**-0.46828."
        ),
        source="Zhang et al. 2024, arXiv:2410.21676",
        caveats=(
            "c * (D / 1e6)**p counts sequences of 512 tokens, with D in millions",
            "The rounded exponent makes the result 1.7 % larger at 24e9 tokens",
        ),
    ),
    Law(
        id="mccandlish_tradeoff",
        name="McCandlish et al.: steps and tokens needed for a loss",
        summary="Computes the steps and tokens that a batch size needs to reach a loss.",
        kind="critical_batch",
        formula=(
            "critical_batch_tokens = D_min / S_min; steps = S_min * (1 + "
            "critical_batch_tokens / B); tokens = D_min * (1 + B / critical_batch_tokens)"
        ),
        function=tradeoff,
        inputs=(
            Input("S_min", "steps_min", "steps to reach the loss at infinite batch size"),
            Input("D_min", "tokens_min", "tokens to reach the loss at the smallest batch size"),
            B,
        ),
        gives=("steps", "tokens", "critical_batch_tokens"),
        setup=(
            "(steps / S_min - 1) * (tokens / D_min - 1) = 1. At the critical batch size, "
            "steps and tokens are both twice their minimum."
        ),
        source="McCandlish et al. 2018, arXiv:1812.06162",
    ),
    Law(
        id="powerlines_bcrit",
        name="Power Lines: critical batch size from tokens",
        summary="Predicts the critical batch size from the minimum number of tokens.",
        kind="critical_batch",
        formula="critical_batch_tokens = 2048 * c * D_min**p",
        function=powerlines,
        inputs=(
            Input(
                "D_min",
                "tokens_min",
                "tokens to reach the loss at the smallest batch size",
                "the training tokens are used for D_min; a small batch would need fewer tokens",
                instead=("tokens",),
            ),
        ),
        gives=("critical_batch_tokens",),
        coefficients={"c": 0.0471, "p": 0.462},
        fitted={"tokens": (2e9, 300e9)},
        conditions={"parametrization": "muP", "sequences": "2048 tokens"},
        setup="D_min / S_min of fitted trade-offs between steps and tokens.",
        source="Bergsma et al. 2025, arXiv:2505.13738",
        caveats=("c * D_min**p counts sequences of 2048 tokens",),
        confirmed=False,
        unconfirmed=("the prefactor 0.0471",),
        shown_at={"D_min": 1e10},
    ),
    Law(
        id="critical_sqrt_t",
        name="Merrill et al.: critical batch size grows with the square root of tokens",
        summary=(
            "States that the critical batch size grows with the square root of the training tokens."
        ),
        kind="critical_batch",
        formula="critical_batch_tokens = k * sqrt(D)",
        function=root,
        inputs=(D,),
        gives=("critical_batch_tokens",),
        unknown={"k": "prefactor; it differs between tokens so far and tokens of the whole run"},
        setup=(
            "A proportionality for the critical batch size at a point of the run. Whenever "
            "the batch grows, lr grows with the square root of that factor."
        ),
        shown_at={"D": 1e10, "k": 2},
        source="Merrill et al. 2025, arXiv:2505.23971",
    ),
    Law(
        id="time_transfer",
        name="Time Transfer: critical and optimal batch size from tokens",
        summary="States how the critical and the optimal batch size grow with training tokens.",
        kind="critical_batch",
        formula="critical_batch_tokens = k * D; batch_tokens = k_opt * sqrt(D)",
        function=regimes,
        inputs=(D,),
        gives=("critical_batch_tokens", "batch_tokens"),
        unknown={
            "k": "critical batch size per token",
            "k_opt": "optimal batch size over the square root of tokens",
        },
        fitted={"n_params": (32e6, 354e6)},
        conditions={"parametrization": "muP", "data": "C4", "model": "MPT"},
        setup=(
            "Proportionalities without a known prefactor. The optimal lr scales as D**-0.5 "
            "far below the critical batch size, is constant near it, and scales as D**0.5 "
            "far above it. Which side rises comes from a review, not from the paper."
        ),
        shown_at={"D": 1e10, "k": 1e-4, "k_opt": 3},
        source="Filatov et al. 2024, arXiv:2410.05838",
        caveats=(
            "The square root of D rests on two batch sizes, 2**18 and 2**20 tokens",
            "Fit k on your own runs",
        ),
    ),
)
