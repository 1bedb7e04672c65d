"""Published laws of the critical batch: where more batch stops saving steps in proportion."""

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
    """Of S = a + b/B: 1.2 B1 + 0.2 b/a    arXiv:2410.21676, in closed form."""
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
    name="Kaplan et al., critical batch against loss",
    kind="critical_batch",
    formula="critical_batch_tokens = B_star / L**(1 / alpha_B)",
    function=by_loss,
    inputs=(L,),
    gives=("critical_batch_tokens",),
    coefficients={"B_star": 2.1e8, "alpha_B": 0.21},
    fitted={"loss": (2.5, 6)},
    conditions={"data": "WebText2"},
    setup="by the gradient noise scale; the same for every N at one loss",
    source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.4",
    traps=(
        "the paper's text rounds B_star to 2e8, its table says 2.1e8",
        "Table 1 of the Step Law paper prints 2e18 * L**-4.7619: the exponent is right, the prefactor 1e10 too large",
    ),
)

ZHANG = Law(
    id="zhang_cbs_N",
    name="Zhang et al., critical batch over size at 20 tokens per parameter",
    kind="critical_batch",
    formula="critical_batch_tokens = 512 * c * (N / 1e6)**p",
    function=zhang_by_size,
    inputs=(N_BODY,),
    gives=("critical_batch_tokens",),
    coefficients={"c": 93.1968140439, "p": 0.468278232813},
    fitted={"n_params": (85e6, 1.2e9)},
    held={"tokens_per_param": 20},
    conditions={
        "schedule": "constant, with averaged weights",
        "optimizer": "AdamW",
        "data": "C4",
        "sequences": "512 tokens",
    },
    setup="a line in logs through 5 sizes; critical is where steps exceed linear scaling from 256 sequences by 20 %",
    source="Zhang et al. 2024, arXiv:2410.21676; the notebook of its repository",
    traps=(
        "c * (N / 1e6)**p counts sequences of 512, with N in millions",
        "fitted without logs it is 99.51 * (N / 1e6)**0.4576",
    ),
)

LAWS = (
    KAPLAN,
    Law(
        id="zhang_cbs_def",
        name="Zhang et al., what they call critical",
        kind="critical_batch",
        formula="critical_batch_tokens = 1.2 * B1 + 0.2 * b / a",
        function=twenty_percent,
        inputs=(
            Input(
                "B1",
                "base_batch_tokens",
                "the batch that scaling is measured from, tokens; 256 sequences in the source",
            ),
        ),
        gives=("critical_batch_tokens",),
        unknown={
            "a": "the steps of S = a + b / B left at infinite batch",
            "b": "its tokens: b / B is what the batch saves",
        },
        conditions=ZHANG.conditions,
        setup="S = a + b / B is fitted to steps against batch at one loss; critical is the batch whose steps are 20 % over linear scaling from B1",
        source=ZHANG.source,
        traps=(
            "the source counts sequences of 512: B1 and b are 512 times as large in tokens",
            "b / a is the critical batch of mccandlish_tradeoff, with a = S_min and b = D_min",
        ),
        shown_at={"a": 1293.82686947, "b": 512 * 2834258.08887, "B1": 512 * 256},
    ),
    ZHANG,
    replace(
        ZHANG,
        id="zhang_cbs_D",
        name="Zhang et al., critical batch over tokens",
        formula="critical_batch_tokens = 512 * c * (D / 1e6)**p",
        function=zhang_by_tokens,
        inputs=(D,),
        coefficients={"c": 22.91, "p": 0.47},
        fitted={"tokens": (1.7e9, 24e9)},
        held={},
        setup="the paper's finding that it grows with D and hardly with N at one D; c is zhang_cbs_N at N = D / 20, 93.197 * 20**-0.46828",
        source="Zhang et al. 2024, arXiv:2410.21676",
        traps=(
            "c * (D / 1e6)**p counts sequences of 512, with D in millions",
            "the rounded exponent makes it 1.7 % larger at 24e9 tokens",
        ),
    ),
    Law(
        id="mccandlish_tradeoff",
        name="Steps against tokens to a loss",
        kind="critical_batch",
        formula="critical_batch_tokens = D_min / S_min; steps = S_min * (1 + critical_batch_tokens / B); tokens = D_min * (1 + B / critical_batch_tokens)",
        function=tradeoff,
        inputs=(
            Input("S_min", "steps_min", "steps to the loss at infinite batch"),
            Input("D_min", "tokens_min", "tokens to the loss at the smallest batch"),
            B,
        ),
        gives=("steps", "tokens", "critical_batch_tokens"),
        setup="(steps / S_min - 1) * (tokens / D_min - 1) = 1; at the critical batch both are twice their least",
        source="McCandlish et al. 2018, arXiv:1812.06162",
    ),
    Law(
        id="powerlines_bcrit",
        name="Power Lines, critical batch over tokens",
        kind="critical_batch",
        formula="critical_batch_tokens = 2048 * c * D_min**p",
        function=powerlines,
        inputs=(
            Input(
                "D_min",
                "tokens_min",
                "tokens to the loss at the smallest batch",
                "tokens trained on are taken for the tokens a small batch would need: fewer",
                instead=("tokens",),
            ),
        ),
        gives=("critical_batch_tokens",),
        coefficients={"c": 0.0471, "p": 0.462},
        fitted={"tokens": (2e9, 300e9)},
        conditions={"parametrization": "muP", "sequences": "2048 tokens"},
        setup="D_min / S_min of fitted trade-offs",
        source="Bergsma et al. 2025, arXiv:2505.13738",
        traps=("c * D_min**p counts sequences of 2048",),
        confirmed=False,
        unconfirmed=("the prefactor 0.0471",),
        shown_at={"D_min": 1e10},
    ),
    Law(
        id="critical_sqrt_t",
        name="Critical batch grows as the root of tokens",
        kind="critical_batch",
        formula="critical_batch_tokens = k * sqrt(D)",
        function=root,
        inputs=(D,),
        gives=("critical_batch_tokens",),
        unknown={"k": "the prefactor, which differs for tokens so far and for the whole run"},
        setup="of the batch critical at a point of the run, with lr times the root of each growth of the batch; a proportionality",
        shown_at={"D": 1e10, "k": 2},
        source="Merrill et al. 2025, arXiv:2505.23971",
    ),
    Law(
        id="time_transfer",
        name="Time Transfer, regimes of the batch over tokens",
        kind="critical_batch",
        formula="critical_batch_tokens = k * D; batch_tokens = k_opt * sqrt(D)",
        function=regimes,
        inputs=(D,),
        gives=("critical_batch_tokens", "batch_tokens"),
        unknown={"k": "critical batch a token", "k_opt": "best batch over the root of tokens"},
        fitted={"n_params": (32e6, 354e6)},
        conditions={"parametrization": "muP", "data": "C4", "model": "MPT"},
        setup="proportionalities, no prefactor known. The best lr goes as D**-0.5 for batches far below the critical one, stays near it, "
        "goes as D**0.5 far above; which side rises was read from a review, not from the paper",
        shown_at={"D": 1e10, "k": 1e-4, "k_opt": 3},
        source="Filatov et al. 2024, arXiv:2410.05838",
        traps=(
            "the root of D rests on two batches, 2**18 and 2**20 tokens",
            "fit k on runs of your own",
        ),
    ),
)
