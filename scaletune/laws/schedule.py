"""Published laws of the lr during a run, and of the loss under any schedule of it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

from scaletune.errors import UserError
from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import B

LRS = Input("lrs", "lr_schedule", "peak to end: one lr a step")
STEPS = Input("steps", "steps", "the step at which the loss is read, at most those of the schedule")
SEQ = 4096  # tokens in the power scheduler's sequences


def power_scheduler(B: float, T: float, lr_max: float, *, a: float, b: float) -> dict[str, float]:
    """lr = min(lr_max, a T^b B/4096)    arXiv:2408.13359."""
    return {"lr_now": min(lr_max, a * T**b * B / SEQ)}


def upto(lrs: tuple[float, ...], steps: float) -> tuple[float, ...]:
    """The lrs of the first steps."""
    if not 1 <= steps <= len(lrs):
        raise UserError(
            f"`1 <= steps <= {len(lrs)}` must hold, the length of lr_schedule, but got {steps:g}"
        )
    return lrs[: int(steps)]


def annealed(lrs: tuple[float, ...], lam: float) -> float:
    """S2: the sum over steps of the lr that fell so far, each fall fading by lam a step; the warmup left out    arXiv:2408.11029."""
    after = lrs[lrs.index(max(lrs)) :]
    fading = total = 0.0
    for before, now in pairwise(after):
        fading = lam * fading + before - now
        total += fading
    return total


def annealing(
    lrs: tuple[float, ...], steps: float, *, L0: float, A: float, alpha: float, C: float, lam: float
) -> dict[str, float]:
    """L = L0 + A S1^-alpha - C S2, S1 the sum of lrs    arXiv:2408.11029."""
    done = upto(lrs, steps)
    return {"loss": L0 + A * math.fsum(done) ** -alpha - C * annealed(done, lam)}


def multi_power(
    lrs: tuple[float, ...],
    steps: float,
    *,
    L0: float,
    A: float,
    alpha: float,
    B: float,
    C: float,
    bet: float,
    gam: float,
) -> dict[str, float]:
    """L = L0 + A S^-alpha - B sum of falls d_k (1 - (1 + C lr_k^-gam (S - S_(k-1)))^-bet), rises counted as falls below 0    arXiv:2503.12811."""
    eta = upto(lrs, steps)
    S = list(accumulate(eta))
    share = (
        1 - (1 + C * now**-gam * (S[-1] - before)) ** -bet if now else 1.0
        for now, before in zip(eta[1:], S, strict=False)
    )
    drop = math.fsum(
        (before - now) * part for before, now, part in zip(eta, eta[1:], share, strict=False)
    )
    return {"loss": L0 + A * S[-1] ** -alpha - B * drop}


ANNEALING = Law(
    id="tissue_annealing",
    name="Loss under annealing: the form",
    kind="schedule",
    formula="eta = lrs[:int(steps)]; S1 = sum(eta); w = eta.index(max(eta)); S2 = sum((eta[k - 1] - eta[k]) * lam**(i - k) "
    "for i in range(len(eta)) for k in range(w + 1, i + 1)); loss = L0 + A * S1**-alpha - C * S2",
    function=annealing,
    inputs=(LRS, STEPS),
    gives=("loss",),
    unknown={
        "L0": "the loss of an endless run",
        "A": "the prefactor of the sum of lrs",
        "alpha": "its exponent",
        "C": "what annealing gains",
        "lam": "how much of a fall of lr is left a step later, 0.99 to 0.999",
    },
    conditions={"schedule": "any: constant, cosine, WSD"},
    setup="S1 is the sum of lrs, S2 sums the fading falls of lr over steps, from the first peak on",
    shown_at={
        "lrs": "cosine:600:60:3e-4:3e-5",
        "steps": 600,
        "L0": 2,
        "A": 1,
        "alpha": 0.5,
        "C": 0.4,
        "lam": 0.999,
    },
    source="Tissue et al. 2024, arXiv:2408.11029",
    traps=("the paper's own constants are not confirmed and not in the catalogue",),
)
ANNEALING_25M = replace(
    ANNEALING,
    id="tissue_refit_25m",
    name="Loss under annealing, refitted on a model of 25 million",
    unknown={},
    coefficients={
        "L0": 3.15828738837,
        "A": 0.513580283261,
        "alpha": 0.513375922302,
        "C": 0.401907695828,
        "lam": 0.999,
    },
    fitted={"steps": (2160, 72000)},
    held={"peak_lr": 3e-4},
    conditions={"schedule": "2160 steps of warmup", "model": "Llama-like, 25e6 parameters"},
    setup="a fit of ours to three public curves (cosine and constant of 24000 steps, one WSD), Huber loss with delta 1e-3 on log loss; within "
    "0.45 % on average of the schedules held out",
    source="arXiv:2408.11029 for the form, the curves of arXiv:2503.12811; the fit is ours",
    traps=("of this model and data alone: coefficients hold absolute lrs",),
    shown_at={"lrs": "cosine:600:60:3e-4:3e-5", "steps": 600},
)
MULTI_POWER_25M = Law(
    id="mpl_25m",
    name="Multi-power law, 25 million parameters",
    kind="schedule",
    formula="eta = lrs[:int(steps)]; S = list(accumulate(eta)); loss = L0 + A * S[-1]**-alpha - B * sum((eta[k - 1] - eta[k]) * "
    "(1 - (1 + C * eta[k]**-gam * (S[-1] - S[k - 1]))**-bet) for k in range(1, len(eta)))",
    function=multi_power,
    inputs=(LRS, STEPS),
    gives=("loss",),
    coefficients={
        "L0": 3.04045406,
        "A": 0.52468604,
        "alpha": 0.50786857,
        "B": 363.78751622,
        "C": 2.06560812,
        "bet": 0.58279013,
        "gam": 0.64142257,
    },
    fitted={"steps": (2160, 72000)},
    held={"peak_lr": 3e-4},
    conditions={"schedule": "2160 steps of warmup", "model": "Llama-like, 25e6 parameters"},
    setup="fitted to cosine, constant and WSD curves; the sums hold the warmup",
    source="Luo et al. 2025, arXiv:2503.12811; coefficients of its repository",
    traps=(
        "what its README calls the maximum of the worst error is the mean over curves of each curve's worst",
        "B is near 400 because falls of lr are near 1e-4: coefficients hold absolute lrs",
    ),
    shown_at={"lrs": "cosine:600:60:3e-4:3e-5", "steps": 600},
)

LAWS = (
    Law(
        id="power_scheduler",
        name="Power scheduler, lr over tokens so far",
        kind="schedule",
        formula="lr_now = min(lr_max, a * T**b * B / 4096)",
        function=power_scheduler,
        inputs=(
            B,
            Input("T", "tokens_seen", "tokens trained on so far, whatever the horizon"),
            Input("lr_max", "lr_cap", "highest lr, of muP's base width", default=0.02),
        ),
        gives=("lr_now",),
        coefficients={"a": 4.6, "b": -0.51},
        fitted={"batch_tokens": (16 * SEQ, 512 * SEQ)},
        conditions={
            "schedule": "warmup, this power, fast exponential decay over the last 10 %",
            "parametrization": "muP: the factors of each layer come on top",
        },
        setup="lr near B / sqrt(T), without knowing how long the run will be",
        source="Shen et al. 2024, arXiv:2408.13359; b and the form as in IBM's released scheduler",
        traps=(
            "a goes with sequences of 4096: in the released code an argument named a is a * B / 4096",
        ),
        confirmed=False,
        unconfirmed=("a = 4.6 and the cap 0.02",),
        shown_at={"B": 128 * SEQ},
    ),
    ANNEALING,
    ANNEALING_25M,
    replace(
        ANNEALING_25M,
        id="tissue_refit_100m",
        name="Loss under annealing, refitted on a model of 100 million",
        coefficients={
            "L0": 2.78889574616,
            "A": 0.592568915955,
            "alpha": 0.454977648225,
            "C": 0.481219185783,
            "lam": 0.999,
        },
        conditions=ANNEALING_25M.conditions | {"model": "Llama-like, 100e6 parameters"},
    ),
    replace(
        ANNEALING_25M,
        id="tissue_refit_400m",
        name="Loss under annealing, refitted on a model of 400 million",
        coefficients={
            "L0": 2.52462156007,
            "A": 0.65360575758,
            "alpha": 0.420498446432,
            "C": 0.570047637697,
            "lam": 0.999,
        },
        conditions=ANNEALING_25M.conditions | {"model": "Llama-like, 400e6 parameters"},
    ),
    MULTI_POWER_25M,
    replace(
        MULTI_POWER_25M,
        id="mpl_100m",
        name="Multi-power law, 100 million parameters",
        coefficients={
            "L0": 2.6514477,
            "A": 0.60115152,
            "alpha": 0.45295811,
            "B": 437.9464276,
            "C": 2.13245612,
            "bet": 0.59785199,
            "gam": 0.65523644,
        },
        conditions=MULTI_POWER_25M.conditions | {"model": "Llama-like, 100e6 parameters"},
    ),
    replace(
        MULTI_POWER_25M,
        id="mpl_400m",
        name="Multi-power law, 400 million parameters",
        coefficients={
            "L0": 2.37474466,
            "A": 0.65421216,
            "alpha": 0.42878731,
            "B": 523.42464371,
            "C": 2.02462735,
            "bet": 0.59350493,
            "gam": 0.63472457,
        },
        conditions=MULTI_POWER_25M.conditions | {"model": "Llama-like, 400e6 parameters"},
    ),
)
