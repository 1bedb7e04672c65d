"""Published laws of the loss during training: over steps at any batch size, and over seconds."""

from __future__ import annotations

from scaletune.laws.critical_batch import by_loss
from scaletune.laws.entry import Input, Law
from scaletune.laws.loss import chinchilla
from scaletune.laws.loss_size import KAPLAN_RUNS
from scaletune.laws.symbols import N_BODY, N_UNSTATED, B


def of_steps_min(
    N: float, S_min: float, *, N_c: float, alpha_N: float, S_c: float, alpha_S: float
) -> dict[str, float]:
    """L = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S    arXiv:2001.08361, eq. 1.6."""
    return {"loss": (N_c / N) ** alpha_N + (S_c / S_min) ** alpha_S}


def of_steps(
    N: float, S: float, B: float, B_crit: float, **coefficients: float
) -> dict[str, float]:
    """`of_steps_min` at S_min = S / (1 + B_crit/B)    arXiv:2001.08361, eq. 1.6 and 5.4."""
    return of_steps_min(N, S / (1 + B_crit / B), **coefficients)


def with_critical_batch(
    N: float, S_min: float, *, B_star: float, alpha_B: float, **coefficients: float
) -> dict[str, float]:
    """`of_steps_min` and the critical batch size at that loss    arXiv:2403.06563."""
    loss = of_steps_min(N, S_min, **coefficients)
    return loss | by_loss(loss["loss"], B_star=B_star, alpha_B=alpha_B)


def of_seconds(
    N: float,
    B_tok: float,
    T: float,
    copies: float,
    *,
    c0: float,
    c1: float,
    E0: float,
    A: float,
    alpha: float,
    B: float,
    beta: float,
) -> dict[str, float]:
    """`chinchilla` at the tokens reached in T seconds    arXiv:2406.18922.

    A step takes c0 + c1 copies seconds.
    """
    return chinchilla(N, B_tok * T / (c0 + c1 * copies), E0=E0, A=A, B=B, alpha=alpha, beta=beta)


S_MIN = Input("S_min", "steps_min", "steps at infinite batch size: S / (1 + B_crit / B)")

LAWS = (
    Law(
        id="kaplan_L_NS",
        name="Kaplan et al.: loss over model size and steps",
        summary="Predicts the loss from model size, steps and batch size.",
        kind="loss_steps",
        formula="S_min = S / (1 + B_crit / B); loss = (N_c / N)**alpha_N + (S_c / S_min)**alpha_S",
        function=of_steps,
        inputs=(
            N_BODY,
            Input("S", "steps", "optimizer steps"),
            B,
            Input(
                "B_crit",
                "critical_batch_tokens",
                "critical batch size at that loss, in tokens, for example from kaplan_bcrit",
            ),
        ),
        gives=("loss",),
        coefficients={"N_c": 6.5e13, "alpha_N": 0.077, "S_c": 2100.0, "alpha_S": 0.76},
        fitted={"n_params": (768, 1.5e9)},
        conditions=KAPLAN_RUNS,
        setup="Unlimited data, after the initial transient of the warmup.",
        source="Kaplan et al. 2020, arXiv:2001.08361, eq. 1.6, Table 3",
        shown_at={"S": 200000, "B": 1e6},
    ),
    Law(
        id="su_unraveling",
        name="Unraveling the Mystery of Scaling Laws: Kaplan's form, fitted in stages",
        summary=(
            "Predicts the loss and the critical batch size from model size and steps at "
            "infinite batch size."
        ),
        kind="loss_steps",
        formula=(
            "loss = (N_c / N)**alpha_N + (S_c / S_min)**alpha_S; critical_batch_tokens = "
            "B_star / loss**(1 / alpha_B)"
        ),
        function=with_critical_batch,
        inputs=(N_BODY, S_MIN),
        gives=("loss", "critical_batch_tokens"),
        coefficients={
            "N_c": 1.5e14,
            "alpha_N": 0.076,
            "S_c": 2600.0,
            "alpha_S": 0.67,
            "B_star": 1.7e8,
            "alpha_B": 0.205,
        },
        fitted={"n_params": (1e6, 60e6)},
        validated={"n_params": 33e9},
        conditions={"data": "like C4"},
        setup=(
            "N_c and alpha_N are fitted to converged models of 1e6 to 60e6 parameters. "
            "B_star and alpha_B are fitted to steps and tokens at several losses of one "
            "small model. Steps are then converted to S_min, and S_c and alpha_S are "
            "fitted. Fit the constants again for other data."
        ),
        source="Su et al. 2024, arXiv:2403.06563",
        confirmed=False,
        unconfirmed=("all six constants",),
        shown_at={"S_min": 100000},
    ),
    Law(
        id="time_matters",
        name="Time Matters: loss over seconds, from memory copies",
        summary=(
            "Predicts the loss after a given training time from model size and memory "
            "copies per step."
        ),
        kind="loss_time",
        formula="D = B_tok * T / (c0 + c1 * copies); loss = E0 + A * N**-alpha + B * D**-beta",
        function=of_seconds,
        inputs=(
            N_UNSTATED,
            Input("B_tok", "batch_tokens", "tokens per step"),
            Input("T", "seconds", "seconds of training"),
            Input(
                "copies",
                "memory_copies",
                "bytes or tensors copied in memory per step, counted from the architecture",
            ),
        ),
        gives=("loss",),
        unknown={
            "c0": "seconds per step without copies; depends on the hardware",
            "c1": "seconds per copy; depends on the hardware",
            **dict.fromkeys(
                ("E0", "A", "alpha", "B", "beta"),
                "coefficient of a loss law in N and D, fitted to your own runs",
            ),
        },
        conditions={"data": "C4", "model": "decoder"},
        setup=(
            "1535 models. The seconds per step are linear in memory copies, not in FLOPs, "
            "and are inserted into a loss law in N and D. The paper concludes that wider "
            "is better than deeper."
        ),
        shown_at={
            "N": 1e8,
            "B_tok": 1e6,
            "T": 2e4,
            "c0": 1,
            "c1": 1e-11,
            "E0": 1,
            "A": 100,
            "alpha": 0.25,
            "B": 10,
            "beta": 0.1,
        },
        source="Inbar & Sernau 2024, arXiv:2406.18922",
        confirmed=False,
        unconfirmed=("the counting of copies, and every constant",),
    ),
)
