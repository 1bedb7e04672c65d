"""Published laws of the learning-rate schedule, and of the loss under a given schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

from scaletune.errors import UserError
from scaletune.laws.entry import Input, Law
from scaletune.laws.symbols import B

LRS = Input("lrs", "lr_schedule", "learning rates of all steps, one per step")
STEPS = Input(
    "steps", "steps", "step at which the loss is evaluated, at most the length of the schedule"
)
SEQ = 4096  # tokens in the power scheduler's sequences


def power_scheduler(B: float, T: float, lr_max: float, *, a: float, b: float) -> dict[str, float]:
    """lr = min(lr_max, a T^b B/4096)    arXiv:2408.13359."""
    return {"lr_now": min(lr_max, a * T**b * B / SEQ)}


def first_lrs(lrs: tuple[float, ...], steps: float) -> tuple[float, ...]:
    """Returns the learning rates of the first `steps` steps."""
    if not 1 <= steps <= len(lrs):
        raise UserError(
            f"`1 <= steps <= {len(lrs)}` must hold, the length of lr_schedule, but got {steps:g}"
        )
    return lrs[: int(steps)]


def annealing_area(lrs: tuple[float, ...], lam: float) -> float:
    """S2: sum over steps of the lr decrease so far, decayed by lam    arXiv:2408.11029.

    Starts at the first peak, so the warmup is left out.
    """
    after = lrs[lrs.index(max(lrs)) :]
    fading = total = 0.0
    for before, now in pairwise(after):
        fading = lam * fading + before - now
        total += fading
    return total


def annealing(
    lrs: tuple[float, ...], steps: float, *, L0: float, A: float, alpha: float, C: float, lam: float
) -> dict[str, float]:
    """L = L0 + A S1^-alpha - C S2, where S1 is the sum of all lrs    arXiv:2408.11029."""
    done = first_lrs(lrs, steps)
    return {"loss": L0 + A * math.fsum(done) ** -alpha - C * annealing_area(done, lam)}


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
    """Multi-power law    arXiv:2503.12811.

    L = L0 + A S^-alpha - B sum of d_k (1 - (1 + C lr_k^-gam (S - S_(k-1)))^-bet), where d_k is
    the decrease of lr at step k (negative for an increase).
    """
    eta = first_lrs(lrs, steps)
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
    name="Loss under lr annealing (functional form only)",
    summary="Gives the loss as a function of the lr schedule, without published coefficients.",
    kind="schedule",
    formula=(
        "eta = lrs[:int(steps)]; S1 = sum(eta); w = eta.index(max(eta)); S2 = "
        "sum((eta[k - 1] - eta[k]) * lam**(i - k) for i in range(len(eta)) for k in "
        "range(w + 1, i + 1)); loss = L0 + A * S1**-alpha - C * S2"
    ),
    function=annealing,
    inputs=(LRS, STEPS),
    gives=("loss",),
    unknown={
        "L0": "loss of an infinitely long run",
        "A": "prefactor of the sum of learning rates",
        "alpha": "exponent of the sum of learning rates",
        "C": "gain from annealing",
        "lam": "share of an lr decrease that remains one step later, 0.99 to 0.999",
    },
    conditions={"schedule": "any: constant, cosine, WSD"},
    setup=(
        "S1 is the sum of the learning rates. S2 sums the decayed lr decreases over "
        "steps, from the first peak on."
    ),
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
    caveats=("The paper's own constants are not confirmed and not in the catalogue",),
)
ANNEALING_25M = replace(
    ANNEALING,
    id="tissue_refit_25m",
    name="Loss under lr annealing, refitted on a model of 25 million parameters",
    summary="Predicts the loss curve of a 25e6-parameter model from the lr schedule.",
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
    setup=(
        "Fitted by scaletune to three public curves (cosine and constant of 24000 "
        "steps, one WSD), Huber loss with delta 1e-3 on log loss. The average error on "
        "held-out schedules is within 0.45 %."
    ),
    source="arXiv:2408.11029 for the form, the curves of arXiv:2503.12811; fitted by scaletune",
    caveats=(
        "Valid for this model and data only: the coefficients depend on absolute learning rates",
    ),
    shown_at={"lrs": "cosine:600:60:3e-4:3e-5", "steps": 600},
)
MULTI_POWER_25M = Law(
    id="mpl_25m",
    name="Multi-power law, 25 million parameters",
    summary="Predicts the loss curve of a 25e6-parameter model from the lr schedule.",
    kind="schedule",
    formula=(
        "eta = lrs[:int(steps)]; S = list(accumulate(eta)); loss = L0 + A * "
        "S[-1]**-alpha - B * sum((eta[k - 1] - eta[k]) * (1 - (1 + C * eta[k]**-gam * "
        "(S[-1] - S[k - 1]))**-bet) for k in range(1, len(eta)))"
    ),
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
    setup="Fitted to cosine, constant and WSD curves. The sums include the warmup.",
    source="Luo et al. 2025, arXiv:2503.12811; coefficients of its repository",
    caveats=(
        (
            "What the README calls the maximum of the worst error is the mean over curves "
            "of each curve's worst error"
        ),
        (
            "B is near 400 because lr decreases are near 1e-4: the coefficients depend on "
            "absolute learning rates"
        ),
    ),
    shown_at={"lrs": "cosine:600:60:3e-4:3e-5", "steps": 600},
)

LAWS = (
    Law(
        id="power_scheduler",
        name="Power scheduler: lr from the tokens so far",
        summary="Computes the lr at any point of a run from batch size and tokens so far.",
        kind="schedule",
        formula="lr_now = min(lr_max, a * T**b * B / 4096)",
        function=power_scheduler,
        inputs=(
            B,
            Input("T", "tokens_seen", "tokens trained on so far, for any token horizon"),
            Input("lr_max", "lr_cap", "highest lr, at muP's base width", default=0.02),
        ),
        gives=("lr_now",),
        coefficients={"a": 4.6, "b": -0.51},
        fitted={"batch_tokens": (16 * SEQ, 512 * SEQ)},
        conditions={
            "schedule": "warmup, this power law, fast exponential decay over the last 10 %",
            "parametrization": "muP; the factors per layer are applied on top",
        },
        setup=(
            "lr is nearly proportional to B / sqrt(T) and does not depend on the length of the run."
        ),
        source="Shen et al. 2024, arXiv:2408.13359; b and the form as in IBM's released scheduler",
        caveats=(
            (
                "a is per sequence of 4096 tokens: in the released code, the argument named a "
                "is a * B / 4096"
            ),
        ),
        confirmed=False,
        unconfirmed=("a = 4.6 and the lr cap 0.02",),
        shown_at={"B": 128 * SEQ},
    ),
    ANNEALING,
    ANNEALING_25M,
    replace(
        ANNEALING_25M,
        id="tissue_refit_100m",
        name="Loss under lr annealing, refitted on a model of 100 million parameters",
        summary="Predicts the loss curve of a 100e6-parameter model from the lr schedule.",
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
        name="Loss under lr annealing, refitted on a model of 400 million parameters",
        summary="Predicts the loss curve of a 400e6-parameter model from the lr schedule.",
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
        summary="Predicts the loss curve of a 100e6-parameter model from the lr schedule.",
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
        summary="Predicts the loss curve of a 400e6-parameter model from the lr schedule.",
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
